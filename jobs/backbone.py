"""Make the small backbone that the package ships: simulate many labs, ingest them, pre-train on all, write the weights.

The labs are of a world that no demo, test or study uses. Pre-training is cross-batch DINO on the pool of all labs: the
partner of an image is an image of the same compound from another batch, also of another lab. Everything resumes;
`configs/backbone.yaml` says what was shipped.
"""

import sys
from pathlib import Path

from pydantic import Field

from coda_ray.config import Config, LocalFolder, parse_job, told_in_one_line
from coda_ray.jump.simulate.settings import SimulateSettings


class BackboneJob(Config):
    """Configuration of jobs/backbone.py."""

    world: SimulateSettings = SimulateSettings()
    """The simulated labs."""
    seed: int = Field(0, ge=0)
    """Seed of weights, samples and views."""
    out: LocalFolder = "coda_ray/weights"
    """Folder for the weights (half precision) and their card."""


def main() -> int:
    """Run the job."""
    job = parse_job(BackboneJob, prog="jobs/backbone.py", description=__doc__ or "")
    from coda_ray.cluster import start_ray
    from coda_ray.jump.ingest import run_ingest
    from coda_ray.jump.simulate.bucket import write_bucket
    from coda_ray.pipeline.backbone import pretrain_backbone
    from coda_ray.pipeline.matrix import StagesFailedError
    from coda_ray.progress import progress_bar
    from coda_ray.storage import open_place

    with told_in_one_line("jobs/backbone.py", RuntimeError, StagesFailedError):
        start_ray()
        if not open_place(job.bucket).exists("simulation.json"):
            with progress_bar("simulating", "sites") as progress:
                print(write_bucket(job.world, job.bucket, progress), flush=True)
        with progress_bar("ingesting", "sites") as show:
            print(run_ingest(job, lambda now: show(now.sites_done, now.sites_total)).text(), flush=True)
        for file in pretrain_backbone(job, job.world, job.seed, Path(job.out), print):
            print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
