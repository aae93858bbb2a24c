"""Adapt a model from one source to one target, score it before and after, and log it to MLflow."""

import sys

from pydantic import Field

from coda_ray.config import Config, Granularity, Method, parse_job


class AdaptJob(Config):
    """Configuration of jobs/adapt.py."""

    source: str
    """Source whose model is adapted."""
    target: str
    """Target that it is adapted to."""
    method: Method | None = None
    """Row of the result matrix; a method that adapts or corrects is scored beside the model that it starts from. Unset,
    tune.method, so that the best.yaml of a sweep is adapted with as it is."""
    granularity: Granularity | None = None
    """Unit of adaptation: the whole target, each of its batches, or each of its plates; unset, tune.granularity."""
    seed: int = Field(0, ge=0)
    """Seed of weights, samples and views."""


def main() -> int:
    """Run the job."""
    job = parse_job(AdaptJob, prog="jobs/adapt.py", description=__doc__ or "")
    from coda_ray.pipeline.report import run_job
    from coda_ray.pipeline.transfer import Request

    method, granularity = job.method or job.tune.method, job.granularity or job.tune.granularity
    request = Request(job.source, job.target, method, granularity, job.seed, job.split)
    name = f"{method} {job.source} to {job.target}, per {granularity}, seed {job.seed}"
    return run_job(job, [request], kind="adapt", name=name)


if __name__ == "__main__":
    sys.exit(main())
