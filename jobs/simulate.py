"""Write a JUMP-shaped bucket of simulated Cell Painting images: TIFFs, illumination, image lists and tables."""

import sys
import time
from typing import Any, Literal

from pydantic import model_validator

from coda_ray.config import Address, EndpointUrl, Place, parse_job, told_in_one_line
from coda_ray.jump.simulate.settings import PRESETS, SimulateSettings


class SimulateJob(SimulateSettings):
    """Configuration of jobs/simulate.py; the preset gives every field that is not given itself."""

    out: Address
    """`s3://bucket` or a folder to write to."""
    endpoint_url: EndpointUrl | None = None
    """URL of an S3-compatible server; unset means AWS itself."""
    preset: Literal["tiny", "demo", "bench"] = "demo"
    """Size: tiny for tests, demo for a first look, bench with full-size fields; the defaults shown here are demo's."""

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, values: Any) -> Any:
        preset = PRESETS.get(values.get("preset", "demo")) if isinstance(values, dict) else None
        return {**preset.model_dump(), **values} if preset else values


def main() -> int:
    """Run the job."""
    job = parse_job(SimulateJob, prog="jobs/simulate.py", description=__doc__ or "")
    from coda_ray.cluster import start_ray
    from coda_ray.jump.simulate.bucket import write_bucket
    from coda_ray.progress import progress_bar

    settings = SimulateSettings.model_validate(job.model_dump(include=set(SimulateSettings.model_fields)))
    begun = time.monotonic()
    with told_in_one_line("jobs/simulate.py"), progress_bar("simulating", "sites") as progress:
        start_ray()
        summary = write_bucket(settings, Place(address=job.out, endpoint_url=job.endpoint_url), progress)
    print(f"{job.out}: {summary}, {time.monotonic() - begun:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
