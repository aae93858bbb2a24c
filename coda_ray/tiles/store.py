"""The tile store: shards of prepared tiles, one index row per tile, plate by plate.

`<tiles>/<preparation key>/<source>/<batch>/<plate>/` holds `shard-00000.npy`, ... ((N, C, H, W) uint8, readable by
`numpy.load`), `index.parquet`, `quarantine.parquet` and, written last, `plate.json`: a plate without it is unfinished.
"""

import hashlib
import io
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from coda_ray.config import Granularity
from coda_ray.storage import Folder

LABEL = "Metadata_MoA"
COMPOUND = "Metadata_JCP2022"
UNIT_COLUMNS: dict[Granularity, str] = {
    "source": "Metadata_Source",
    "batch": "Metadata_Batch",
    "plate": "Metadata_Plate",
}
# Tables of one index row per tile that a process keeps, of each kind.
KEPT_SELECTIONS = 32
INDEX_SCHEMA = pa.schema(
    [
        ("Metadata_Source", pa.string()),
        ("Metadata_Batch", pa.string()),
        ("Metadata_Plate", pa.string()),
        ("Metadata_Well", pa.string()),
        ("Metadata_Site", pa.string()),
        (COMPOUND, pa.string()),
        ("Metadata_InChIKey", pa.string()),
        ("Metadata_Control", pa.string()),
        (LABEL, pa.string()),
        ("shard", pa.string()),
        ("row", pa.int32()),
        ("offset", pa.int64()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("pixel_size_um", pa.float32()),
        ("crc32", pa.int64()),
    ]
)
QUARANTINE_SCHEMA = pa.schema(
    [(f"Metadata_{name}", pa.string()) for name in ("Source", "Batch", "Plate", "Well", "Site")]
    + [("channel", pa.string()), ("address", pa.string()), ("reason", pa.string())]
)


def content_key(content: Any) -> str:
    """Name a JSON-able value by 16 hexadecimal digits of its SHA-256.

    Parameters
    ----------
    content
        Nested mappings, lists, strings, numbers, booleans and None.

    Returns
    -------
    str
        The same for equal content, whatever the order of keys.
    """
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class TileIndex:
    """Tiles that can be read: one row each.

    Selections that a plan makes again and again are kept, and with them their fingerprints.

    Parameters
    ----------
    frame
        Rows of `INDEX_SCHEMA`; the label column may be absent (see `without_labels`).
    folder
        Folder that shard addresses are relative to.
    channels
        Channels of a tile, in order.
    """

    frame: pd.DataFrame
    folder: Folder
    channels: tuple[str, ...]

    def __len__(self) -> int:
        """Number of tiles."""
        return len(self.frame)

    def where(self, mask: Any) -> "TileIndex":
        """Keep the rows of a boolean mask."""
        return TileIndex(self.frame[mask].reset_index(drop=True), self.folder, self.channels)

    def unit(self, granularity: Granularity, name: str) -> "TileIndex":
        """Keep one source, or one batch or plate of tiles of one lab."""
        return _unit(self, granularity, name)

    def units(self, granularity: Granularity) -> list[str]:
        """Sorted names of the sources, batches or plates."""
        return sorted(self.frame[UNIT_COLUMNS[granularity]].unique())

    def codes(self, granularity: Granularity) -> NDArray[np.int64]:
        """Number each tile's source, batch or plate, (N,), in the order in which they come.

        Those of two labs are two, whatever their names.
        """
        columns = list(dict.fromkeys([UNIT_COLUMNS["source"], UNIT_COLUMNS[granularity]]))
        return self.frame.groupby(columns, sort=False).ngroup().to_numpy().astype(np.int64)

    def count(self, granularity: Granularity) -> int:
        """Count the sources, batches or plates; those of two labs are two, whatever their names."""
        return int(self.codes(granularity).max(initial=-1)) + 1

    def without_labels(self) -> "TileIndex":
        """Drop the MoA label: what adaptation sees."""
        return _without_labels(self)

    def labelled(self) -> "TileIndex":
        """Keep the tiles that have a MoA label."""
        return _labelled(self)

    @property
    def smallest_side(self) -> int:
        """Shortest side of any tile (px)."""
        return int(self.frame[["height", "width"]].to_numpy().min())

    @cached_property
    def fingerprint(self) -> str:
        """Hash of what the tiles are (content checksums and every Metadata_ column present)."""
        columns = [*sorted(name for name in map(str, self.frame) if name.startswith("Metadata_")), "shard", "row", "crc32"]
        digest = hashlib.sha256(json.dumps([self.channels, columns]).encode())
        for column in columns:
            digest.update("\x1f".join(map(str, self.frame[column].tolist())).encode())
        return digest.hexdigest()[:16]


@lru_cache(maxsize=KEPT_SELECTIONS)
def _unit(index: TileIndex, granularity: Granularity, name: str) -> TileIndex:
    """Keep one source, batch or plate."""
    return index.where(index.frame[UNIT_COLUMNS[granularity]] == name)


@lru_cache(maxsize=KEPT_SELECTIONS)
def _without_labels(index: TileIndex) -> TileIndex:
    """Drop the MoA label."""
    return TileIndex(index.frame.drop(columns=LABEL, errors="ignore"), index.folder, index.channels)


@lru_cache(maxsize=KEPT_SELECTIONS)
def _labelled(index: TileIndex) -> TileIndex:
    """Keep the tiles that have a MoA label."""
    return index.where(index.frame[LABEL].notna())


def forget_selections() -> None:
    """Let go of the selections that were kept."""
    for kept in (_unit, _without_labels, _labelled):
        kept.cache_clear()


@dataclass(frozen=True)
class TileStore:
    """A folder of tiles that were prepared alike.

    Parameters
    ----------
    folder
        `<tiles>/<preparation key>`.
    preparation
        The settings that decide a tile's pixels; `channels` among them.
    """

    folder: Folder
    preparation: Mapping[str, Any]

    @classmethod
    def open(cls, tiles: Folder, preparation: Mapping[str, Any]) -> "TileStore":
        """Open the store of one preparation; it need not exist yet."""
        return cls(tiles.child(content_key(dict(preparation))), preparation)

    @staticmethod
    def plate_path(source: str, batch: str, plate: str) -> str:
        """Folder of a plate, relative to the store."""
        return f"{source}/{batch}/{plate}"

    def is_finished(self, plate_path: str) -> bool:
        """Whether a plate was written whole."""
        return self.folder.exists(f"{plate_path}/plate.json")

    def write_shard(self, plate_path: str, number: int, tiles: NDArray[np.uint8]) -> pd.DataFrame:
        """Write one shard.

        Parameters
        ----------
        plate_path
            From `plate_path`.
        number
            Number of the shard within its plate.
        tiles
            (N, C, H, W) uint8.

        Returns
        -------
        DataFrame
            N rows: shard, row, offset, height, width, crc32.
        """
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, np.ascontiguousarray(tiles), allow_pickle=False)
        data = buffer.getvalue()
        shard = f"{plate_path}/shard-{number:05d}.npy"
        self.folder.write(shard, data)
        header, size = len(data) - tiles.nbytes, tiles[0].nbytes
        rows = np.arange(len(tiles))
        return pd.DataFrame(
            {
                "shard": shard,
                "row": rows,
                "offset": header + rows * size,
                "height": tiles.shape[2],
                "width": tiles.shape[3],
                "crc32": [zlib.crc32(tile.tobytes()) for tile in tiles],
            }
        )

    def write_quarantine(self, plate_path: str, quarantine: pd.DataFrame) -> str:
        """Write the table of the tiles of a plate that were set aside, and give its address."""
        path = f"{plate_path}/quarantine.parquet"
        self.folder.write(path, _parquet(quarantine, QUARANTINE_SCHEMA))
        return self.folder.address(path)

    def finish_plate(self, plate_path: str, index: pd.DataFrame, quarantine: pd.DataFrame, facts: Mapping[str, Any]) -> None:
        """Write a plate's tables, and `plate.json` last, which makes the plate count."""
        self.write_plate_index(plate_path, index)
        self.write_quarantine(plate_path, quarantine)
        note = {**facts, "tiles": len(index), "quarantined": len(quarantine), "preparation": dict(self.preparation)}
        self.folder.write(f"{plate_path}/plate.json", json.dumps(note, indent=1).encode())

    def plate_index(self, plate_path: str) -> pd.DataFrame:
        """Read the rows of one finished plate."""
        frame: pd.DataFrame = read_parquet(self.folder, f"{plate_path}/index.parquet").to_pandas()
        return frame

    def write_plate_index(self, plate_path: str, index: pd.DataFrame) -> None:
        """Write the rows of one plate."""
        self.folder.write(f"{plate_path}/index.parquet", _parquet(index, INDEX_SCHEMA))

    def plates(self, sources: Sequence[str] = ()) -> list[str]:
        """Sorted paths of the finished plates, of all sources or of the named ones."""
        return [
            path
            for source in (sources or self.folder.names())
            for batch in self.folder.names(source)
            for plate in self.folder.names(f"{source}/{batch}")
            if self.is_finished(path := self.plate_path(source, batch, plate))
        ]

    def index(self, sources: Sequence[str]) -> TileIndex:
        """Load the index of some sources, rows in a fixed order.

        Raises
        ------
        FileNotFoundError
            When a source has no finished plate.
        """
        tables = []
        for source in sources:
            paths = self.plates([source])
            if not paths:
                raise FileNotFoundError(
                    f"{self.folder.address(source)}: no finished plate of {source!r} prepared with these settings "
                    "(ingest.*); run jobs/ingest.py with this configuration first"
                )
            tables += [read_parquet(self.folder, f"{path}/index.parquet") for path in paths]
        frame = pa.concat_tables(tables).to_pandas()
        return TileIndex(frame, self.folder, tuple(self.preparation["channels"]))


def read_tiles(index: TileIndex, rows: NDArray[np.int64], crop: int) -> list[NDArray[np.uint8] | Exception]:
    """Read tiles by ranged requests, all at once.

    Parameters
    ----------
    index
        The tiles.
    rows
        (N,) positions in the index.
    crop
        Side of the centre crop (px).

    Returns
    -------
    list
        N arrays (C, crop, crop) uint8, or the error of a tile: FileNotFoundError where its shard is not there, ValueError
        where it is damaged or too small.

    Raises
    ------
    OSError
        When permission or network errors outlast the retries.
    """
    picked = index.frame.iloc[rows]
    columns = (picked[name].tolist() for name in ("shard", "offset", "height", "width", "crc32"))
    wanted = [(*row, len(index.channels)) for row in zip(*columns, strict=True)]
    found = index.folder.read_ranges([(s, o, o + c * h * w) for s, o, h, w, _, c in wanted])
    return [_decode(data, *row, crop=crop) for data, row in zip(found, wanted, strict=True)]


def _decode(
    data: bytes | Exception, shard: str, offset: int, height: int, width: int, crc32: int, channels: int, *, crop: int
) -> NDArray[np.uint8] | Exception:
    """Check one tile's bytes and cut its centre."""
    if isinstance(data, FileNotFoundError):
        return FileNotFoundError(f"{shard}: shard is missing")
    if isinstance(data, Exception):
        return data
    if len(data) != channels * height * width or zlib.crc32(data) != crc32:
        return ValueError(f"{shard} at byte {offset}: damaged tile (length or checksum differs from the index)")
    top, left = (height - crop) // 2, (width - crop) // 2
    if min(top, left) < 0:
        return ValueError(f"{shard}: tile of {height} x {width} px is smaller than views.tile_crop = {crop}")
    tile = np.frombuffer(data, np.uint8).reshape(channels, height, width)
    return tile[:, top : top + crop, left : left + crop]


def _parquet(frame: pd.DataFrame, schema: pa.Schema) -> bytes:
    """Serialise a table; a column that is absent becomes null."""
    table = pa.Table.from_pandas(frame.reindex(columns=schema.names), schema=schema, preserve_index=False)
    return table_bytes(table)


def table_bytes(table: pa.Table) -> bytes:
    """Serialise a table as a parquet file."""
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def read_parquet(folder: Folder, path: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a table from storage, or some of its columns."""
    return pq.read_table(io.BytesIO(folder.read(path)), columns=columns and list(columns))
