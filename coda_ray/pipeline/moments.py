"""The stage that measures tokens: their mean and spread on every plate, for standardisation before a frozen classifier."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import ray.train
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from coda_ray.config import Config
from coda_ray.learn.moments import Moments, token_sums
from coda_ray.learn.precision import choose_precision
from coda_ray.pipeline.data import DataError
from coda_ray.pipeline.stage import Stage, pass_inputs, pass_workload
from coda_ray.pipeline.train_stages import Made, extractor_input, load_model, stage_tensors
from coda_ray.progress import Tell
from coda_ray.storage import Folder, open_place
from coda_ray.tiles.store import TileIndex
from coda_ray.training.checkpoints import write_result
from coda_ray.training.infer import infer
from coda_ray.training.launch import device_of
from coda_ray.training.loop import Report

SUMS = "sums.safetensors"


@dataclass(frozen=True)
class MomentsRun:
    """What a worker needs to know; picklable, without weights."""

    folder: Folder
    config: Config
    index: TileIndex
    classifier: Stage
    adapted: Stage | None


def moments(config: Config, index: TileIndex, what: str, classifier: Stage, adapted: Stage | None = None) -> Stage:
    """Plan the moments of a model's tokens on every plate of some tiles; no label is read.

    Parameters
    ----------
    config
        Settings.
    index
        The tiles.
    what
        Name of the tiles, for people.
    classifier
        The labelled stage of the model.
    adapted
        An adaptation of the model, whose tokens are measured; None takes the model as it is.
    """
    tiles = index.without_labels()
    title = f"moments of {(adapted or classifier).title} on {what}"
    make = partial(_make, config, tiles, classifier, adapted)
    inputs = pass_inputs(config, tiles) | extractor_input(config, adapted)
    needs = (classifier, adapted) if adapted else (classifier,)
    return Stage("moments", title, inputs, make, needs, pass_workload(config, tiles))


def moments_of_all(config: Config, stage: Stage) -> Moments:
    """Read the moments over all plates of a finished stage, (2, D)."""
    tensors, _ = _read(config, stage)
    return Moments.of(tensors["sums"].sum(0), tensors["count"].sum())


def moments_of_tiles(config: Config, stage: Stage, index: TileIndex) -> Moments:
    """Read, for each tile of an index, the moments of its plate, (N, 2, D).

    Raises
    ------
    DataError
        When the stage did not see a plate of the index.
    """
    tensors, plates = _read(config, stage)
    known = {plate: number for number, plate in enumerate(plates)}
    names = plate_names(index)
    missing = sorted(set(names) - known.keys())
    if missing:
        raise DataError(f"{stage.title}: no readable tile of plate {missing[0]}, so it cannot be standardised")
    codes = torch.tensor([known[name] for name in names])
    return Moments.of(tensors["sums"], tensors["count"]).rows(codes)


def plate_names(index: TileIndex) -> NDArray[np.str_]:
    """Name each tile's plate, (N,); where the tiles are of several labs, by its lab too."""
    frame = index.frame
    names = frame["Metadata_Batch"] + "/" + frame["Metadata_Plate"]
    return (names if index.count("source") == 1 else frame["Metadata_Source"] + "/" + names).to_numpy(str)


def _read(config: Config, stage: Stage) -> tuple[dict[str, Tensor], list[str]]:
    """Read the sums and the names of their plates."""
    tensors = stage_tensors(config, stage, SUMS)
    return tensors, (stage.facts(open_place(config.results)) or {})["plates"]


def _make(
    config: Config, index: TileIndex, classifier: Stage, adapted: Stage | None, folder: Folder, report: Report | None
) -> Made:
    """Describe the stage to the worker loop; it has no curve to report."""
    return moments_loop, MomentsRun(folder, config, index, classifier, adapted)


def moments_loop(config: Mapping[str, Any]) -> dict[str, Any]:
    """Sum over this worker's share of the tiles, then over the workers; rank 0 writes.

    Parameters
    ----------
    config
        `{"run": MomentsRun, "tell": Tell | None}`, as Ray Train passes it.

    Returns
    -------
    dict
        Facts: tiles that were read, plates, seconds.
    """
    run: MomentsRun = config["run"]
    begun = time.monotonic()
    torch.set_num_threads(run.config.train.threads)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    steps = -(-len(run.index) // (run.config.evaluate.minibatch * world))
    tell: Tell | None = config["tell"] if rank == 0 else None
    device = device_of(run.config.train)
    model = load_model(run.config, run.classifier, run.adapted, len(run.index.channels)).to(device).eval()
    plates, code = np.unique(plate_names(run.index), return_inverse=True)
    width = model.width
    sums, count = np.zeros((len(plates), 4 * width)), np.zeros(len(plates))
    outputs = infer(
        lambda views, _: token_sums(model.features(views)).flatten(1),
        run.index,
        run.config,
        device=device,
        precision=choose_precision(device, run.config.train.precision),
        rank=rank,
        world=world,
    )
    for part in outputs:
        np.add.at(sums, code[part.rows], part.values)
        np.add.at(count, code[part.rows], 1)
        if tell is not None:
            tell(part.step + 1, steps)
    both = torch.from_numpy(np.column_stack([count, sums])).to(device)
    if world > 1:
        dist.all_reduce(both)
    if rank:
        return {}
    return _write(run, plates.tolist(), both.cpu(), world, begun)


def _write(run: MomentsRun, plates: list[str], both: Tensor, workers: int, begun: float) -> dict[str, Any]:
    """Write the sums of plates that had a readable tile."""
    seen = both[:, 0] > 0
    count, sums = both[seen, 0], both[seen, 1:].reshape(-1, 2, 2, (both.shape[1] - 1) // 4)
    return {
        **write_result(run.folder, SUMS, {"count": count, "sums": sums}),
        "plates": [plate for plate, any_tile in zip(plates, seen.tolist(), strict=True) if any_tile],
        "tiles": int(count.sum()),
        "workers": workers,
        "seconds": round(time.monotonic() - begun, 3),
    }
