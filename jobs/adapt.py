"""Adapt a model from one source to one target, score it before and after, and log it to MLflow."""

import sys
from typing import Any

from pydantic import Field

from coda_ray.config import Config, Granularity, parse_job
from coda_ray.methods import Method


def tune_method(known: dict[str, Any]) -> Method:
    """Method that a sweep chose, or searches with."""
    method: Method = known["tune"].method
    return method


def tune_granularity(known: dict[str, Any]) -> Granularity:
    """Granularity that a sweep chose, or searches with."""
    granularity: Granularity = known["tune"].granularity
    return granularity


class AdaptJob(Config):
    """Configuration of jobs/adapt.py."""

    source: str
    """Source whose model is adapted."""
    target: str
    """Target that it is adapted to."""
    method: Method = Field(default_factory=tune_method)
    """Row of the result matrix; a method that adapts or corrects is scored beside the model that it starts from. Unset,
    tune.method, so that the best.yaml of a sweep is adapted with as it is."""
    granularity: Granularity = Field(default_factory=tune_granularity)
    """Unit of adaptation: the whole target, each of its batches, or each of its plates; unset, tune.granularity."""
    seed: int = Field(0, ge=0)
    """Seed of weights, samples and views."""


def main() -> int:
    """Run the job."""
    job = parse_job(AdaptJob, prog="jobs/adapt.py", description=__doc__ or "")
    from coda_ray.pipeline.report import run_job
    from coda_ray.pipeline.request import Request

    request = Request(job.source, job.target, job.method, job.granularity, job.seed, job.split)
    name = f"{job.method} {job.source} to {job.target}, per {job.granularity}, seed {job.seed}"
    return run_job(job, [request], kind="adapt", name=name)


if __name__ == "__main__":
    sys.exit(main())
