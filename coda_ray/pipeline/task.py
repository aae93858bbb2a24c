"""The Ray task that runs one stage; apart from the matrix, so that its processes import neither tables nor figures."""

from typing import Any

import ray

from coda_ray.cluster import quieten
from coda_ray.config import Config
from coda_ray.pipeline.stage import Stage
from coda_ray.training.loop import Report


def _run(stage: Stage, config: Config, report: Report | None, *needs: dict[str, Any]) -> dict[str, Any]:
    """Run one stage in a Ray task; `needs` are there for their order alone."""
    quieten()
    try:
        return stage.run(config, report)
    finally:
        close = getattr(report, "close", None)
        if close is not None:
            close()


# max_calls=0 keeps the process, and what it has imported, for the next stage, on a GPU too; 1 gives each stage a new one.
run_stage = ray.remote(max_calls=0)(_run)
run_stage_afresh = ray.remote(max_calls=1)(_run)
