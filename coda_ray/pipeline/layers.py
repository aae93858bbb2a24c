"""The stage that compares layers: how alike two feature extractors see the same tiles, block by block (CKA)."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from numpy.typing import NDArray
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from coda_ray.analysis.cka import MinibatchCka
from coda_ray.config import Config
from coda_ray.learn.precision import choose_precision
from coda_ray.learn.vit import build_vit, layer_tokens, load_exactly
from coda_ray.pipeline import data, networks
from coda_ray.pipeline.stage import Stage, pass_inputs
from coda_ray.pipeline.train_stages import Made, extractor_of
from coda_ray.storage import Folder, open_place
from coda_ray.tiles.store import TileIndex, read_parquet, table_bytes
from coda_ray.training.infer import infer
from coda_ray.training.launch import device_of
from coda_ray.training.loop import Report

# Bounds the memory; the estimate does not depend on it.
MINIBATCH = 32
READINGS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "all tokens": lambda tokens: tokens.flatten(1),
    "CLS": lambda tokens: tokens[:, 0],
}


@dataclass(frozen=True)
class LayersRun:
    """What a comparison needs to know; picklable, without weights."""

    folder: Folder
    config: Config
    index: TileIndex
    extractors: tuple[Stage, Stage]


def compare_layers(config: Config, index: TileIndex, first: Stage, second: Stage) -> Stage:
    """Plan the comparison of every block of one feature extractor with every block of another (CODA, figure 6).

    Parameters
    ----------
    config
        Settings; `report.layer_tiles` of the tiles are looked at.
    index
        The tiles; no label is read.
    first, second
        Pre-trainings or adaptations of the same architecture.
    """
    tiles = data.drawn(index, config.report.layer_tiles)
    inputs = pass_inputs(config, tiles)
    if config.dino.extractor != "teacher":
        inputs["extractor"] = config.dino.extractor
    title = f"layers of {first.title} beside {second.title}"
    return Stage("layers", title, inputs, partial(_make, config, tiles, (first, second)), (first, second), runs_on="worker")


def layers_of(config: Config, stage: Stage) -> dict[str, NDArray[np.float64]]:
    """Read a finished comparison.

    Returns
    -------
    dict
        `all tokens` and `CLS` to (blocks of the first, blocks of the second) float64 CKA.
    """
    frame = read_parquet(open_place(config.results), f"{stage.path}/cka.parquet").to_pandas()
    return {
        str(name): part.pivot(index="first", columns="second", values="cka").to_numpy(np.float64)
        for name, part in frame.groupby("reading", sort=False)
    }


def _make(config: Config, index: TileIndex, extractors: tuple[Stage, Stage], folder: Folder, report: Report | None) -> Made:
    """Describe the stage to the worker loop; it has no curve to report."""
    return layers_loop, LayersRun(folder, config, index, extractors)


def layers_loop(config: Mapping[str, Any]) -> dict[str, Any]:
    """Compare; write `cka.parquet`.

    Parameters
    ----------
    config
        `{"run": LayersRun}`, as Ray Train passes it.

    Returns
    -------
    dict
        Facts: tiles that were asked for, seconds.
    """
    run: LayersRun = config["run"]
    begun = time.monotonic()
    torch.set_num_threads(run.config.train.threads)
    device = device_of(run.config.train)
    pair = [_extractor(run, stage).to(device).eval() for stage in run.extractors]
    minibatch = min(MINIBATCH, len(run.index))
    gathered = {name: MinibatchCka() for name in READINGS}

    def look(views: Tensor, _: NDArray[np.int64]) -> Tensor:
        """Add one mini-batch; a short one is passed over, because each counts alike."""
        if len(views) == minibatch:
            layers = [layer_tokens(vit, views) for vit in pair]
            for name, reading in READINGS.items():
                gathered[name].update(*[[reading(block).float().cpu().numpy() for block in side] for side in layers])
        return views.new_empty(len(views), 0)

    outputs = infer(
        look,
        run.index,
        run.config,
        minibatch=minibatch,
        device=device,
        precision=choose_precision(device, run.config.train.precision),
    )
    for _ in outputs:
        pass
    matrices = {name: cka.matrix() for name, cka in gathered.items()}
    rows = [(name, i + 1, j + 1, value) for name, matrix in matrices.items() for (i, j), value in np.ndenumerate(matrix)]
    frame = pd.DataFrame(rows, columns=["reading", "first", "second", "cka"])
    run.folder.write("cka.parquet", table_bytes(pa.Table.from_pandas(frame, preserve_index=False)))
    return {"tiles": len(run.index), "seconds": round(time.monotonic() - begun, 3)}


def _extractor(run: LayersRun, stage: Stage) -> VisionTransformer:
    """Load one feature extractor."""
    vit = build_vit(networks.vit_spec(run.config, len(run.index.channels)), drop_path=0.0)
    load_exactly(vit, extractor_of(run.config, stage), stage.title)
    return vit
