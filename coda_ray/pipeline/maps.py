"""The stage that draws a map of features: embeddings before and after adaptation, side by side in one plane (UMAP)."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import pandas as pd
import pyarrow as pa

from coda_ray.analysis.projection import project
from coda_ray.config import Config
from coda_ray.pipeline import data
from coda_ray.pipeline.evaluate import FEATURE, TILE_ID, embeddings_of
from coda_ray.pipeline.stage import Stage
from coda_ray.pipeline.train_stages import Made
from coda_ray.storage import Folder, open_place
from coda_ray.tiles.store import TileIndex, read_parquet, table_bytes
from coda_ray.training.loop import Report

STATES = ("before", "after")
# Of the projection.
SEED = 0


@dataclass(frozen=True)
class MapRun:
    """What a map needs to know; picklable, without features."""

    folder: Folder
    config: Config
    index: TileIndex
    evaluations: tuple[Stage, Stage]


def map_features(config: Config, index: TileIndex, before: Stage, after: Stage) -> Stage:
    """Plan a map of the CLS embeddings of the same tiles before and after adaptation, in one fit (CODA, figure 5).

    Parameters
    ----------
    config
        Settings; `report.map_tiles` of the tiles are drawn.
    index
        The evaluated tiles; no label is read.
    before, after
        Evaluations of the unadapted and of the adapted model.
    """
    tiles = data.drawn(index, config.report.map_tiles)
    title = f"map of {before.title} beside {after.title}"
    inputs = {"tiles": tiles.fingerprint, "seed": SEED}
    return Stage("map", title, inputs, partial(_make, config, tiles, (before, after)), (before, after), runs_on="cpu")


def map_of(config: Config, stage: Stage) -> pd.DataFrame:
    """Read a finished map: a tile's Metadata_ names, `state` (before, after), `x`, `y`; one row per tile and state."""
    return cast(pd.DataFrame, read_parquet(open_place(config.results), f"{stage.path}/map.parquet").to_pandas())


def _make(config: Config, index: TileIndex, evaluations: tuple[Stage, Stage], folder: Folder, report: Report | None) -> Made:
    """Describe the stage to the worker loop; it has no curve to report."""
    return map_loop, MapRun(folder, config, index, evaluations)


def map_loop(config: Mapping[str, Any]) -> dict[str, Any]:
    """Project; write `map.parquet`.

    Parameters
    ----------
    config
        `{"run": MapRun}`, as Ray Train passes it.

    Returns
    -------
    dict
        Facts: tiles that both evaluations could read, seconds.
    """
    run: MapRun = config["run"]
    begun = time.monotonic()
    tables = [embeddings_of(run.config, stage).set_index(TILE_ID).filter(like=FEATURE) for stage in run.evaluations]
    wanted = pd.MultiIndex.from_frame(run.index.frame[TILE_ID])
    both = wanted[wanted.isin(tables[0].index) & wanted.isin(tables[1].index)]
    places = project(np.concatenate([table.loc[both].to_numpy(np.float32) for table in tables]), seed=SEED)
    frame = pd.concat([both.to_frame(index=False).assign(state=state) for state in STATES], ignore_index=True)
    frame[["x", "y"]] = places
    run.folder.write("map.parquet", table_bytes(pa.Table.from_pandas(frame, preserve_index=False)))
    return {"tiles": len(both), "seconds": round(time.monotonic() - begun, 3)}
