"""What a read task of the stream does: sample numbers in, tiles out. Imports no torch, so that task processes start fast."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import numpy as np
import pandas as pd
import ray
from numpy.typing import NDArray

from coda_ray.config import Place
from coda_ray.storage import open_place
from coda_ray.tiles.plan import Rows, SamplePlan
from coda_ray.tiles.store import TileIndex, content_key, read_tiles

REPLACEMENTS = 8
READ_COLUMNS = ["shard", "offset", "height", "width", "crc32"]


@dataclass(frozen=True)
class TileSource:
    """What a read task needs: where tiles are, which make a sample, and the labels only where they are asked for.

    Parameters
    ----------
    index
        Locations of the tiles; every Metadata_ column is dropped.
    plan
        Which rows make a sample.
    crop
        Side of the centre crop (px).
    labels
        (N,) int64 class per row for labelled training; None for everything label-free.
    replace
        Whether another sample stands in for one that cannot be read; without, it is marked `readable` = False.
    cache
        Folder on the node's own disk for copies of the shards; None reads every tile from storage.
    """

    index: TileIndex
    plan: SamplePlan
    crop: int
    labels: NDArray[np.int64] | None = None
    replace: bool = True
    cache: str | None = None

    def __post_init__(self) -> None:
        """Keep nothing but the columns that reading needs, small, because every worker process fetches them."""
        numbers = {name: pd.to_numeric(self.index.frame[name], downcast="unsigned") for name in READ_COLUMNS[1:]}
        frame = pd.DataFrame({"shard": self.index.frame["shard"].astype("category"), **numbers})
        object.__setattr__(self, "index", TileIndex(frame, self.index.folder, self.index.channels))

    def read(self, samples: Rows) -> dict[str, NDArray[Any]]:
        """Read samples.

        Parameters
        ----------
        samples
            (M,) sample numbers.

        Returns
        -------
        dict
            `sample` (M,) int64; `tile` and, with pairs, `partner` (M, C, crop, crop) uint8; `label` (M,) int64 where
            asked for; `row` (M,) int64; `replaced` (M,) int32 tiles that failed; `readable` (M,) bool;
            `reason` (M,) str, empty where nothing failed.

        Raises
        ------
        OSError
            When permission or network errors outlast the retries: they are no property of a tile.
        """
        anchors, partners = self.plan.rows(samples)
        sides = [anchors] if partners is None else [anchors, partners]
        images = np.zeros((len(sides), len(samples), len(self.index.channels), self.crop, self.crop), np.uint8)
        bad = np.zeros(len(samples), np.int32)
        reasons = np.full(len(samples), "", object)
        pending = np.arange(len(samples))
        for attempt in range(REPLACEMENTS + 1):
            if attempt:
                others = self.plan.replacement(samples[pending], attempt - 1)
                for side, other in zip(sides, others, strict=False):
                    side[pending] = cast(Rows, other)
            pending = self._fill(sides, pending, images, bad, reasons)
            if not len(pending) or not self.replace:
                break
        columns: dict[str, NDArray[Any]] = {"sample": samples, "row": anchors, "replaced": bad, "reason": reasons.astype(str)}
        columns["readable"] = ~np.isin(np.arange(len(samples)), pending)
        columns |= dict(zip(("tile", "partner"), images, strict=False))
        if self.labels is not None:
            columns["label"] = self.labels[anchors]
        return columns

    def _near(self, rows: Rows) -> TileIndex:
        """Copy the shards of some rows to the node's own disk, where a cache is wanted and they are not there yet."""
        if self.cache is None:
            return self.index
        far = self.index.folder
        server = getattr(far.fs, "endpoint_url", None)
        near = open_place(Place(address=f"{self.cache}/{content_key([server, far.address()])}"))
        for shard in self.index.frame["shard"].iloc[rows].unique():
            if not near.exists(shard):
                try:
                    near.write(shard, far.read(shard))
                except FileNotFoundError:
                    return self.index
        return TileIndex(self.index.frame, near, self.index.channels)

    def _read(self, rows: Rows) -> list[NDArray[np.uint8] | Exception]:
        """Read the tiles of some rows; what a copy does not give whole is read from storage."""
        near = self._near(rows)
        found = read_tiles(near, rows, self.crop)
        failed = [i for i, tile in enumerate(found) if isinstance(tile, Exception)]
        if near is self.index or not failed:
            return found
        for i, tile in zip(failed, read_tiles(self.index, rows[failed], self.crop), strict=True):
            found[i] = tile
            if not isinstance(tile, Exception):
                near.folder.delete(near.frame["shard"].iloc[rows[i]])
        return found

    def _fill(
        self, sides: list[Rows], pending: Rows, images: NDArray[np.uint8], bad: NDArray[np.int32], reasons: NDArray[Any]
    ) -> Rows:
        """Read the samples at some places into `images`; count and note what fails, and return those places."""
        rows = np.concatenate([side[pending] for side in sides])
        found = self._read(rows)
        failed = []
        for number, place in enumerate(pending):
            errors = []
            for side, tile in enumerate(found[number :: len(pending)]):
                if isinstance(tile, FileNotFoundError | ValueError):
                    errors.append(tile)
                elif isinstance(tile, Exception):
                    raise tile
                else:
                    images[side, place] = tile
            if errors:
                failed.append(place)
                bad[place] += len(errors)
                reasons[place] = str(errors[0])
        return np.array(failed, np.int64)


def read_task(block: dict[str, NDArray[np.int64]], source: "list[ray.ObjectRef[TileSource]]") -> dict[str, NDArray[Any]]:
    """One Ray task: read a block of samples. The reference comes in a list, so that Ray does not resolve it per task."""
    return _fetch(source[0]).read(np.asarray(block["item"]))


@lru_cache(maxsize=4)
def _fetch(reference: "ray.ObjectRef[TileSource]") -> TileSource:
    """Get a stream's tables once per worker process."""
    return ray.get(reference)
