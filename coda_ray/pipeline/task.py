"""The Ray task that runs one stage; apart from the matrix, so that its processes import neither tables nor figures."""

from typing import Any

import ray

from coda_ray.cluster import quieten
from coda_ray.config import Config
from coda_ray.pipeline.stage import Stage
from coda_ray.training.loop import Report


@ray.remote(max_calls=0)
def run_stage(stage: Stage, config: Config, report: Report | None, *needs: dict[str, Any]) -> dict[str, Any]:
    """Run one stage in a warm Ray task; `needs` are there for their order alone.

    max_calls=0 keeps the process, and what it has imported, for the next stage on GPUs too.
    """
    quieten()
    try:
        return stage.run(config, report)
    finally:
        close = getattr(report, "close", None)
        if close is not None:
            close()
