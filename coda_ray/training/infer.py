"""Forward passes over tiles in their order: for scores, embeddings and the monitors of training."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from coda_ray.config import Config
from coda_ray.learn.precision import Precision
from coda_ray.learn.views import evaluation_view
from coda_ray.tiles.plan import SamplePlan
from coda_ray.tiles.reader import TileSource
from coda_ray.tiles.store import TileIndex
from coda_ray.tiles.stream import minibatches, on_device


@dataclass(frozen=True)
class Outputs:
    """What a network said of tiles that could be read.

    Parameters
    ----------
    rows
        (N,) int64 rows of the index.
    values
        (N, K) float32: what `forward` returned.
    step
        The mini-batch that they come from.
    """

    rows: NDArray[np.int64]
    values: NDArray[np.float32]
    step: int


def in_order(index: TileIndex, crop: int) -> TileSource:
    """Read every tile once, in the order of the index; an unreadable one is left out, not replaced."""
    rows = np.arange(len(index), dtype=np.int64)
    return TileSource(index, SamplePlan(0, rows, shuffle=False), crop, replace=False)


def infer(
    forward: Callable[[torch.Tensor, NDArray[np.int64]], torch.Tensor],
    index: TileIndex,
    config: Config,
    *,
    minibatch: int | None = None,
    device: torch.device,
    precision: Precision,
    rank: int = 0,
    world: int = 1,
    start_step: int = 0,
) -> Iterator[Outputs]:
    """Run a network over the centre view of every tile.

    Parameters
    ----------
    forward
        Maps views (B, C, size, size), and their rows (B,) of the index, to (B, K).
    index
        The tiles.
    config
        Settings of the views (centre crop of the tile, side of the global view) and of the stream.
    minibatch
        Tiles per forward pass and worker; None takes `evaluate.minibatch`.
    device, precision
        Where and in what the network computes.
    rank, world
        This worker's share.
    start_step
        Mini-batch to begin with.

    Yields
    ------
    Outputs
        Per mini-batch.
    """
    everywhere = (minibatch or config.evaluate.minibatch) * world
    batches = minibatches(
        in_order(index, config.views.tile_crop),
        config.stream,
        minibatch=everywhere,
        start_step=start_step,
        steps=-(-len(index) // everywhere),
        rank=rank,
        world=world,
        last=len(index),
    )
    for step, tensors in enumerate(on_device(batches, device), start_step):
        readable = tensors["readable"]
        views = evaluation_view(tensors["tile"][readable.to(device)], config.views.size_global)
        if not len(views):
            continue
        rows = tensors["row"][readable].numpy()
        with torch.no_grad(), precision.autocast():
            values = forward(views, rows)
        yield Outputs(rows, values.float().cpu().numpy(), step)


def gather(outputs: Iterator[Outputs]) -> Outputs:
    """Join mini-batches; the step is the last one's."""
    parts = list(outputs)
    return Outputs(np.concatenate([p.rows for p in parts]), np.concatenate([p.values for p in parts]), parts[-1].step)
