"""The stream: sample numbers -> tiles -> torch mini-batches, carried by Ray Data.

Every worker runs its own pipeline over its own sample numbers, from any step on: a plan of numbers, read tasks that fetch
tiles by ranged requests, and prefetching into mini-batches. Ray Data's back-pressure bounds what is in flight.
"""

import logging
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NoReturn, cast

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.data import TaskPoolStrategy

from coda_ray.config import Stream
from coda_ray.tiles.pause import Pause
from coda_ray.tiles.plan import Rows, share_of
from coda_ray.tiles.reader import REPLACEMENTS, TileSource, read_task

log = logging.getLogger(__name__)
ON_DEVICE = ("tile", "partner", "label")
MEND_TILES = "delete the folder of their plate in the tile store, and run jobs/ingest.py, which makes them again"


class UnreadableTilesError(RuntimeError):
    """Too many tiles could not be read."""


def minibatches(
    source: TileSource,
    settings: Stream,
    *,
    minibatch: int,
    start_step: int,
    steps: int,
    rank: int = 0,
    world: int = 1,
    last: int | None = None,
) -> Iterator[dict[str, torch.Tensor]]:
    """Stream one worker's mini-batches.

    Parameters
    ----------
    source
        What to read.
    settings
        Sizes of tasks and buffers.
    minibatch
        Samples per step over all workers.
    start_step, steps
        First step, and one past the last.
    rank, world
        This worker and the number of workers; they split each step's samples and change none.
    last
        One past the last sample number, where the last mini-batch may be short (evaluation).

    Yields
    ------
    dict
        Tensors on the CPU, as `TileSource.read` names them, without `reason`.

    Raises
    ------
    UnreadableTilesError
        When more than `settings.max_bad_share` of the tiles read so far could not be read, or when no replacement of a
        sample could; names the most frequent reason.
    """
    low, high = share_of(rank, world, minibatch)
    if high == low:
        raise ValueError(f"minibatch = {minibatch} is smaller than the {world} workers; raise it or take fewer workers")
    reference = ray.put(replace(source, cache=settings.cache))
    health = Health(settings.max_bad_share, source.replace)
    for begin in range(start_step, steps, settings.segment_steps):
        numbers = np.arange(begin, min(begin + settings.segment_steps, steps), dtype=np.int64)[:, None] * minibatch
        samples = (numbers + np.arange(low, high, dtype=np.int64)[None, :]).ravel()
        if last is not None:
            samples = samples[samples < last]
        dataset = sample_dataset(reference, samples, settings)
        batches = dataset.iter_batches(batch_size=high - low, batch_format="numpy", prefetch_batches=settings.prefetch)
        for columns in cast(Iterator[dict[str, NDArray[Any]]], batches):
            health.count(columns)
            yield {name: torch.from_numpy(columns[name].copy()) for name in columns if name != "reason"}


def on_device(stream: Iterator[dict[str, torch.Tensor]], device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """Move mini-batches to a GPU, one ahead of the step that needs it, without waiting for the copy.

    Parameters
    ----------
    stream
        From `minibatches`.
    device
        Where tiles and labels are wanted; on the CPU they stay as they are.

    Yields
    ------
    dict
        The same tensors; sample numbers and counts stay on the host.
    """
    if device.type == "cpu":
        yield from stream
        return
    ahead: deque[dict[str, torch.Tensor]] = deque()
    for tensors in stream:
        moved = {name: tensors[name].pin_memory().to(device, non_blocking=True) for name in ON_DEVICE if name in tensors}
        ahead.append({**tensors, **moved})
        if len(ahead) > 1:
            yield ahead.popleft()
    yield from ahead


def sample_dataset(source: "ray.ObjectRef[TileSource]", samples: Rows, settings: Stream) -> ray.data.Dataset:
    """Plan the reading of samples: numbers -> read tasks; the order is kept.

    Parameters
    ----------
    source
        What to read.
    samples
        (M,) sample numbers.
    settings
        Sizes of tasks, and how many run at a time.

    Returns
    -------
    Dataset
        Columns as `TileSource.read` gives them.
    """
    tasks = max(1, -(-len(samples) // settings.rows_per_task))
    # from_items makes its blocks here; from_numpy and from_arrow run tasks that reserve a CPU.
    dataset: ray.data.Dataset = ray.data.from_items(samples.tolist(), override_num_blocks=tasks)
    dataset.context.execution_options.preserve_order = True
    dataset.context.custom_execution_callback_classes = [Pause]
    return dataset.map_batches(
        cast(Any, read_task),
        fn_kwargs={"source": [source]},
        batch_size=None,
        batch_format="numpy",
        # Ray Data shares whole CPUs out among the pipelines of a cluster: with more pipelines than CPUs, tasks that reserve any
        # would never start.
        num_cpus=0,
        compute=TaskPoolStrategy(size=min(settings.tasks, tasks)),
    )


class Health:
    """Counts the tiles that failed, reports the first of each reason, and stops a run that reads mostly damage."""

    def __init__(self, max_share: float, replace: bool) -> None:
        self.max_share, self.replace = max_share, replace
        self.read = 0
        self.bad = 0
        self.reasons: Counter[str] = Counter()

    def count(self, columns: dict[str, NDArray[Any]]) -> None:
        """Add one mini-batch."""
        tiles = len(columns["sample"]) * (2 if "partner" in columns else 1)
        bad = int(columns["replaced"].sum())
        self.read, self.bad = self.read + tiles + (bad if self.replace else 0), self.bad + bad
        for reason in map(str, columns["reason"][columns["reason"] != ""]):
            if reason not in self.reasons:
                log.warning(
                    "tile %s (%d of %d so far): %s", "replaced" if self.replace else "left out", self.bad, self.read, reason
                )
            self.reasons[reason] += 1
        if self.bad > self.max_share * max(self.read, 100):
            self._stop(f"above stream.max_bad_share = {self.max_share}", ", or raise stream.max_bad_share")
        lost = columns["sample"][~columns["readable"]]
        if self.replace and len(lost):
            self._stop(f"sample {lost[0]} and its {REPLACEMENTS} replacements could not be read")

    def _stop(self, why: str, otherwise: str = "") -> NoReturn:
        """Stop with the most frequent reason."""
        raise UnreadableTilesError(
            f"{self.bad} of {self.read} tiles could not be read: {why}; the most frequent reason: "
            f"{self.reasons.most_common(1)[0][0]}; {MEND_TILES}{otherwise}"
        )
