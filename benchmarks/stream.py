"""Measure the stream beside what a user would pick instead, over one tile store in a folder or behind a real S3 server.

loader: a torch DataLoader with worker processes over the same pairs, one ranged request per tile
ray:    coda_ray's stream on Ray Data, with as many read tasks as the loader has workers

Both deliver the same samples in the same order and must end with the same checksum; a difference is an error (exit code
1). A consumer may take its time per step (`--step-ms`), as training does: then the memory column shows whether a stream
reads ahead without bound. Memory is the sum of the proportional set sizes of all processes of a side, at its peak.
"""

import argparse
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

# Ray lowers the priority of its workers; beside the loader's processes that would be no comparison.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import numpy as np
import pandas as pd
import psutil
import torch
from torch.utils.data import DataLoader, Dataset

from coda_ray.cluster import start_ray
from coda_ray.config import Place, Stream
from coda_ray.jump.simulate.serve import serve_folder
from coda_ray.storage import open_place
from coda_ray.tiles.plan import Partners, SamplePlan
from coda_ray.tiles.reader import TileSource
from coda_ray.tiles.store import COMPOUND, LABEL, TileIndex, TileStore, read_tiles
from coda_ray.tiles.stream import minibatches

SEED = 0
KEY = ("benchmark-key-0001", "benchmark-secret-0001")
Minibatch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Measured:
    """What one side did."""

    images_per_s: float
    peak_mib: float
    checksum: int


class Pairs(Dataset[Minibatch]):
    """The pairs of a plan as a map-style data set: the plain way."""

    def __init__(self, index: TileIndex, plan: SamplePlan, crop: int) -> None:
        self.index, self.plan, self.crop = index, plan, crop

    def __getitem__(self, sample: int) -> Minibatch:
        """Read one pair."""
        anchors, partners = self.plan.rows(np.array([sample]))
        if partners is None:
            raise ValueError("the plan makes no pairs")
        tile, partner = (read_tiles(self.index, rows, self.crop)[0] for rows in (anchors, partners))
        return torch.from_numpy(np.asarray(tile).copy()), torch.from_numpy(np.asarray(partner).copy())


def main(argv: list[str] | None = None) -> int:
    """Run both sides in turn and print one line each."""
    options = _parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tiles").mkdir()
        os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"] = KEY
        server: AbstractContextManager[str | None] = nullcontext()
        if options.storage == "s3":
            server = serve_folder(folder, key=KEY)
        with server as url:
            tiles = Place(address="s3://tiles" if url else f"{folder}/tiles", endpoint_url=url)
            index = write_store(tiles, options)
            codes = [pd.factorize(index.frame[name])[0].astype(np.int64) for name in (COMPOUND, "Metadata_Batch")]
            plan = SamplePlan(SEED, np.arange(len(index)), Partners.build(*codes))
            size = f"{len(index)} tiles of 3 x {options.side} x {options.side}"
            print(f"{size} in {options.storage}, {options.steps} steps of {options.minibatch} pairs, {options.workers} readers")
            loader = measure(lambda: by_loader(index, plan, options), options)
            start_ray()
            by_stream(index, plan, options, 2)  # Ray is warm, as it is in a cluster
            stream = measure(lambda: by_stream(index, plan, options, options.steps), options)
    for name, side in (("loader", loader), ("ray", stream)):
        print(f"{name:7} {side.images_per_s:8.1f} images/s   peak {side.peak_mib:7.0f} MiB   checksum {side.checksum}")
    equal = loader.checksum == stream.checksum
    ratio = stream.images_per_s / loader.images_per_s
    print(f"ratio ray / loader {ratio:.2f}, checksums {'equal' if equal else 'DIFFERENT'}")
    return 0 if equal else 1


def write_store(place: Place, options: argparse.Namespace) -> TileIndex:
    """Write tiles of noise: four batches, two plates each, ten compounds."""
    rng = np.random.default_rng(SEED)
    store = TileStore.open(open_place(place), {"version": 0, "channels": ["DNA", "ER", "Mito"]})
    per_plate = options.tiles // 8
    for plate in range(8):
        batch, name = f"b{plate // 2}", f"p{plate}"
        path = store.plate_path("s", batch, name)
        rows = pd.DataFrame({"Metadata_Well": [f"A{i:04d}" for i in range(per_plate)]})
        rows = rows.assign(Metadata_Source="s", Metadata_Batch=batch, Metadata_Plate=name, Metadata_Site="1")
        rows[COMPOUND] = [f"c{i % 10}" for i in range(per_plate)]
        rows[LABEL] = None
        shards = []
        for number, start in enumerate(range(0, per_plate, 64)):
            count = min(64, per_plate - start)
            shards.append(store.write_shard(path, number, rng.integers(0, 256, (count, 3, options.side, options.side), np.uint8)))
        index = pd.concat([pd.concat(shards, ignore_index=True), rows], axis=1)
        store.finish_plate(path, index, pd.DataFrame(), {})
    return store.index(["s"])


def by_loader(index: TileIndex, plan: SamplePlan, options: argparse.Namespace) -> Iterator[Minibatch]:
    """Deliver by a torch DataLoader."""
    loader = DataLoader(
        Pairs(index, plan, options.side),
        batch_size=options.minibatch,
        sampler=range(options.steps * options.minibatch),
        num_workers=options.workers,
        prefetch_factor=2,
        multiprocessing_context="spawn",
    )
    yield from loader


def by_stream(index: TileIndex, plan: SamplePlan, options: argparse.Namespace, steps: int) -> Iterator[Minibatch]:
    """Deliver by coda_ray's stream."""
    source = TileSource(index, plan, options.side)
    settings = Stream(tasks=options.workers)
    for tensors in minibatches(source, settings, minibatch=options.minibatch, start_step=0, steps=steps):
        yield tensors["tile"], tensors["partner"]


def measure(deliver: Callable[[], Iterable[Minibatch]], options: argparse.Namespace) -> Measured:
    """Consume every step; time from the second mini-batch on, so that the start of processes is not in it."""
    checksum = 0
    started = 0.0
    with PeakMemory() as memory:
        for step, (tile, partner) in enumerate(deliver()):
            weight = step % 7 + 1
            checksum += weight * (int(tile.sum(dtype=torch.int64)) + 3 * int(partner.sum(dtype=torch.int64)))
            time.sleep(options.step_ms / 1e3)
            if step == 0:
                started = time.perf_counter()
        seconds = time.perf_counter() - started
    return Measured(2 * options.minibatch * (options.steps - 1) / seconds, memory.peak_mib, checksum)


class PeakMemory:
    """Samples the memory of this process and all its children, twice a second."""

    def __enter__(self) -> "PeakMemory":
        """Begin to sample."""
        self.peak_mib = 0.0
        self._ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop sampling."""
        self._ended.set()
        self._sampler.join()

    def _sample(self) -> None:
        own = psutil.Process()
        while not self._ended.wait(0.5):
            total = 0
            for process in [own, *own.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:  # it has just ended
                    continue
            self.peak_mib = max(self.peak_mib, total / 2**20)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", choices=["folder", "s3"], default="folder", help="where the tiles lie (default: folder)")
    parser.add_argument("--tiles", type=int, default=2048, help="tiles in the store (default: %(default)s)")
    parser.add_argument("--side", type=int, default=128, help="side of a tile, px (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="steps to deliver (default: %(default)s)")
    parser.add_argument("--minibatch", type=int, default=32, help="pairs per step (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="worker processes, and read tasks (default: %(default)s)")
    parser.add_argument("--step-ms", type=float, default=0.0, help="what the consumer takes per step, ms (default: 0)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
