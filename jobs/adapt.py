"""Adapt a model from one source to one target, score it before and after, and log it to MLflow."""

import sys
from typing import Any, Self

from pydantic import Field, model_validator

from coda_ray.config import Config, Granularity, SourceName, check_pair, parse_job
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

    source: SourceName
    """Source whose model is adapted; several labs together, a pool, as sim_a+sim_b."""
    target: SourceName
    """Target that it is adapted to: one lab, and none of the source's; the source itself is scored on its held-out plates."""
    method: Method = Field(default_factory=tune_method)
    """Row of the result matrix; a method that adapts or corrects is scored beside the model that it starts from. Unset,
    tune.method, so that the best.yaml of a sweep is adapted with as it is."""
    granularity: Granularity = Field(default_factory=tune_granularity)
    """Unit of adaptation: the whole target, each of its batches, or each of its plates; unset, tune.granularity."""
    seed: int = Field(0, ge=0)
    """Seed of weights, samples and views."""

    @model_validator(mode="after")
    def _target_is_another_lab(self) -> Self:
        check_pair(self.source, self.target)
        return self


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
