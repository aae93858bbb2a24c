"""The whole way in minutes: simulate three labs, serve them by S3, ingest, train, adapt, compare.

Everything lands in `demo/`; a second run does only what is missing.
"""

import json
import sys
from pathlib import Path

from pydantic import Field

from coda_ray.config import Config, ConfigError, Place, Section, build_config, parse_job, told_in_one_line
from coda_ray.jump.simulate.settings import PRESETS, SIMULATOR_VERSION, SimulateSettings

ROOT = Path("demo")


class DemoJob(Section):
    """Configuration of jobs/demo.py; configs/demo.yaml holds the rest."""

    seed: int = Field(0, ge=0)
    """Seed of the simulated world."""


def main() -> int:
    """Run the job."""
    job = parse_job(DemoJob, prog="jobs/demo.py", description=__doc__ or "")
    # RuntimeError: an ingest that stopped, or a server that did not start.
    with told_in_one_line("jobs/demo.py", RuntimeError):
        return _run(PRESETS["demo"].model_copy(update={"seed": job.seed}))


def _run(settings: SimulateSettings) -> int:
    """Go the whole way."""
    config = build_config(Config, "configs/demo.yaml")
    gallery, lab = ROOT / "bucket", ROOT / "lab"
    bucket = gallery / "cellpainting-gallery"
    is_there = _is_there(bucket, settings)
    from coda_ray.cluster import start_ray
    from coda_ray.jump.simulate.serve import own_keys, serve_folder

    key = own_keys()
    start_ray()
    if is_there:
        print(f"simulated bucket: {bucket} is there", flush=True)
    else:
        _simulate(bucket, settings)
    (lab / "tiles").mkdir(parents=True, exist_ok=True)
    # One public bucket, read only, and one that asks for keys, as a laboratory has them.
    with serve_folder(gallery, read_only=True) as public, serve_folder(lab, key=key) as private:
        print(f"S3 on loopback: images at {public} (anonymous), tiles at {private} (with keys)", flush=True)
        images = Place(address="s3://cellpainting-gallery", anonymous=True, endpoint_url=public)
        config = config.model_copy(
            update={
                "bucket": images,
                "metadata": images.model_copy(update={"address": f"{images.address}/metadata"}),
                "tiles": Place(address="s3://tiles", endpoint_url=private),
                "stream": config.stream.model_copy(update={"cache": str((ROOT / "cache").absolute())}),
            }
        )
        return _ingest(config) or _matrix(config)


def _is_there(bucket: Path, settings: SimulateSettings) -> bool:
    """Whether the bucket was written already.

    Raises
    ------
    ConfigError
        When it was written with other settings, or by another version of the simulator.
    """
    file = bucket / "simulation.json"
    if not file.exists():
        return False
    record = json.loads(file.read_text(encoding="utf-8"))
    # A record that lacks a setting is older than it, and was written as if it had the default.
    found = {"version": record["version"], **SimulateSettings().model_dump(mode="json"), **record["settings"]}
    wanted = {"version": SIMULATOR_VERSION, **settings.model_dump(mode="json")}
    others = [f"{name} {found.get(name)}, not {value}" for name, value in wanted.items() if found.get(name) != value]
    if others:
        raise ConfigError(f"{bucket.parent} holds another world ({'; '.join(others)}); run make clean")
    return True


def _simulate(bucket: Path, settings: SimulateSettings) -> None:
    """Write the bucket."""
    from coda_ray.jump.simulate.bucket import write_bucket
    from coda_ray.progress import progress_bar

    with progress_bar("simulating", "sites") as progress:
        print(write_bucket(settings, Place(address=str(bucket)), progress), flush=True)


def _ingest(config: Config) -> int:
    """Prepare the tiles."""
    from coda_ray.jump.ingest import run_ingest
    from coda_ray.progress import progress_bar

    with progress_bar("ingesting", "sites") as show:
        summary = run_ingest(config, lambda now: show(now.sites_done, now.sites_total))
    print(summary.text(), flush=True)
    return 0


def _matrix(config: Config) -> int:
    """Train, adapt, score, log."""
    from coda_ray.pipeline.matrix import requests_of
    from coda_ray.pipeline.report import run_job

    return run_job(config, requests_of(config), kind="matrix", name="demo matrix")


if __name__ == "__main__":
    sys.exit(main())
