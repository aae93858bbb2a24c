"""The stage that joins evaluations of units: every tile as the model of its own batch or plate sees it."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from coda_ray.config import Config, Granularity
from coda_ray.pipeline.evaluate import FEATURE, PROBABILITY, embeddings_of, predictions_of, write_predictions
from coda_ray.pipeline.stage import Stage
from coda_ray.pipeline.train_stages import Made
from coda_ray.storage import Folder
from coda_ray.tiles.store import UNIT_COLUMNS
from coda_ray.training.loop import Report


@dataclass(frozen=True)
class CombinationRun:
    """What a worker needs to know; picklable, without predictions."""

    folder: Folder
    config: Config
    column: str
    units: tuple[str, ...]
    evaluations: tuple[Stage, ...]


def combine(config: Config, title: str, granularity: Granularity, evaluations: Mapping[str, Stage]) -> Stage:
    """Plan one table of predictions and one of embeddings out of those of several models, as `evaluate` writes them.

    Parameters
    ----------
    config
        Settings.
    title
        For people.
    granularity
        What the units are.
    evaluations
        Unit to the evaluation of its model, which covers the unit.
    """
    column, units = UNIT_COLUMNS[granularity], tuple(evaluations)
    parts = tuple(evaluations.values())
    make = partial(_make, config, column, units, parts)
    return Stage("combine", title, {"column": column, "units": list(units)}, make, parts, runs_on="cpu")


def _make(
    config: Config, column: str, units: tuple[str, ...], evaluations: tuple[Stage, ...], folder: Folder, report: Report | None
) -> Made:
    """Describe the stage to the worker loop; it has no curve to report."""
    return combine_loop, CombinationRun(folder, config, column, units, evaluations)


def combine_loop(config: Mapping[str, Any]) -> dict[str, Any]:
    """Join the tables.

    Parameters
    ----------
    config
        `{"run": CombinationRun}`, as Ray Train passes it.

    Returns
    -------
    dict
        Facts: tiles, seconds.
    """
    run: CombinationRun = config["run"]
    begun = time.monotonic()
    predictions, embeddings = (
        pd.concat([_of_unit(read(run.config, stage), run.column, unit) for unit, stage in _parts(run)], ignore_index=True)
        for read in (predictions_of, embeddings_of)
    )
    named = predictions.filter(like=PROBABILITY)
    write_predictions(
        run.folder,
        predictions.filter(like="Metadata_"),
        [str(name).removeprefix(PROBABILITY) for name in named],
        named.to_numpy(np.float32),
        embeddings.filter(like=FEATURE).to_numpy(np.float32),
    )
    return {"tiles": len(predictions), "seconds": round(time.monotonic() - begun, 3)}


def _parts(run: CombinationRun) -> list[tuple[str, Stage]]:
    """Pair units and evaluations."""
    return list(zip(run.units, run.evaluations, strict=True))


def _of_unit(frame: pd.DataFrame, column: str, unit: str) -> pd.DataFrame:
    """Keep the rows of one unit."""
    return frame[frame[column] == unit]
