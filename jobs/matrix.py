"""Run every source, target, method, granularity and seed of the configuration, and print the source x target matrix.

With --dry-run nothing is run, Ray is not started, and tiles need not be there: it prints every stage with its tiles, steps and
images, GPU hours and storage. Plates that are not ingested yet are planned from the metadata tables and the section `estimate`.
"""

import sys

from pydantic_settings import CliImplicitFlag

from coda_ray.config import Config, parse_job, told_in_one_line


class MatrixJob(Config):
    """Configuration of jobs/matrix.py."""

    dry_run: CliImplicitFlag[bool] = False
    """Print what would run and what it would take, and stop."""


def main() -> int:
    """Run the job."""
    job = parse_job(MatrixJob, prog="jobs/matrix.py", description=__doc__ or "")
    from coda_ray.pipeline import dry_run
    from coda_ray.pipeline.matrix import requests_of
    from coda_ray.pipeline.report import run_job

    config, wanted = Config.model_validate(job.model_dump(exclude={"dry_run"})), job.matrix
    with told_in_one_line("jobs/matrix.py"):
        requests = requests_of(config)
    if job.dry_run:
        return dry_run.show(config, requests)
    name = f"matrix of {len(wanted.sources)} x {len(wanted.targets)}, {', '.join(wanted.methods)}"
    return run_job(config, requests, kind="matrix", name=name)


if __name__ == "__main__":
    sys.exit(main())
