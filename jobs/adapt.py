"""Adapt a model from one source to one target, score it before and after, and log it to MLflow."""

import sys
from typing import Any, Self

from pydantic import Field, model_validator

from coda_ray.config import Address, Config, Granularity, SourceName, check_pair, parse_job, told_in_one_line
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

    source: SourceName | None = None
    """Source whose model is adapted; several labs together, a pool, as sim_a+sim_b."""
    exported: Address | None = None
    """Instead of a source: a folder of jobs/export.py, or its `s3://` address (reached as results are). The model that it
    holds is adapted, and no tile of its source is needed."""
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
        if (self.source is None) == (self.exported is None):
            raise ValueError("give either source, the lab whose model is adapted, or exported, the folder of a model")
        if self.source:
            check_pair(self.source, self.target)
        return self


def main() -> int:
    """Run the job."""
    job = parse_job(AdaptJob, prog="jobs/adapt.py", description=__doc__ or "")
    from coda_ray.learn.exported import ModelError
    from coda_ray.pipeline.imported import import_model
    from coda_ray.pipeline.report import run_job
    from coda_ray.pipeline.request import Request

    config: Config = job
    source, model = job.source, None
    if job.exported:
        with told_in_one_line("jobs/adapt.py", ModelError):
            config, model = import_model(job, job.exported, job.method)
        source = str(model.classifier.inputs["source"])
    request = Request(str(source), job.target, job.method, job.granularity, job.seed, job.split)
    name = f"{job.method} {source} to {job.target}, per {job.granularity}, seed {job.seed}"
    return run_job(config, [request], kind="adapt", name=name, model=model)


if __name__ == "__main__":
    sys.exit(main())
