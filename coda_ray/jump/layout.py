"""Where a JUMP bucket keeps its image lists, and how the two layouts of a list are read into one table.

Channel, well and site come from the list alone, never from a file name: channel numbers differ between sources, and in one
source between acquisitions.
"""

import csv
import gzip
import io
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from coda_ray.storage import Folder

METADATA = ("Metadata_Source", "Metadata_Batch", "Metadata_Plate", "Metadata_Well", "Metadata_Site")
# The current layout first: it is the one that is kept right.
LIST_FOLDERS = ("load_data_csv", "load_data_csv_orig")
LIST_NAMES = ("load_data_with_illum.parquet", "load_data_with_illum.csv", "load_data_with_illum.csv.gz")
KINDS = ("Orig", "Illum")


class PlateName(NamedTuple):
    """Source, batch and plate: what names a plate in the bucket."""

    source: str
    batch: str
    plate: str


def find_image_list(bucket: Folder, dataset: str, plate: PlateName) -> str | None:
    """Find a plate's image list.

    Parameters
    ----------
    bucket
        The bucket.
    dataset
        Folder of the data set, such as cpg0016-jump.
    plate
        Its source, batch and name.

    Returns
    -------
    str or None
        Path relative to the bucket, of the current layout where there is one, else of the old one.
    """
    for folder in LIST_FOLDERS:
        base = f"{dataset}/{plate.source}/workspace/{folder}/{plate.batch}/{plate.plate}"
        there = set(bucket.names(base))
        for name in LIST_NAMES:
            if name in there:
                return f"{base}/{name}"
    return None


def parse_image_list(data: bytes, address: str, channels: Sequence[str], extra: Sequence[str] = ()) -> pd.DataFrame:
    """Read one image list of either layout.

    Parameters
    ----------
    data
        Content of a .parquet, .csv or .csv.gz file; its kind is told by the content.
    address
        Where it came from, for messages.
    channels
        Channels to take; one that the list lacks gives no column.
    extra
        Further columns to take where the list has them.

    Returns
    -------
    DataFrame
        One row per listed site, strings: `Metadata_{Source,Batch,Plate,Well,Site}` as far as the list has them,
        `Orig_<channel>` and `Illum_<channel>` with full addresses; an empty cell is a missing value.

    Raises
    ------
    ValueError
        When the file is neither Parquet nor CSV, or lists no well and site.
    """
    wanted = [*METADATA, *extra]
    for kind in KINDS:
        wanted += [f"{part}_{kind}{channel}" for part in ("URL", "PathName", "FileName") for channel in channels]
    try:
        table = _read_strings(data, wanted)
    except (pa.ArrowException, csv.Error, zlib.error, OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{address}: not an image list (Parquet or CSV): {error}") from error
    lacking = {"Metadata_Well", "Metadata_Site"} - set(table)
    if lacking:
        raise ValueError(f"{address}: has no column {sorted(lacking)[0]}; an image list names well and site of each row")
    columns = {name: table[name] for name in (*METADATA, *extra) if name in table}
    for kind in KINDS:
        for channel in channels:
            found = _addresses(table, f"{kind}{channel}")
            if found is not None:
                columns[f"{kind}_{channel}"] = found
    return pd.DataFrame(columns)


def map_address(address: str, listed_as: str, bucket: Folder) -> str:
    """Turn the address that a list gives into one that can be read here.

    Parameters
    ----------
    address
        As listed: under `listed_as`, absolute, or relative to the bucket.
    listed_as
        Prefix that lists write for the bucket, such as s3://cellpainting-gallery.
    bucket
        Where the bucket is served.

    Returns
    -------
    str
        Full address.
    """
    prefix = listed_as.rstrip("/") + "/"
    if address.startswith(prefix):
        return bucket.address(address[len(prefix) :])
    if "://" in address or address.startswith("/"):
        return address
    return bucket.address(address)


def _read_strings(data: bytes, wanted: Sequence[str]) -> pd.DataFrame:
    """Read those of the wanted columns that the file has, as strings."""
    if data[:4] == b"PAR1":
        table = pq.read_table(io.BytesIO(data))
        names = [name for name in wanted if name in table.column_names]
        return _frame(pa.table({name: table[name].cast(pa.string()) for name in names})).replace("", None)
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    end = data.find(b"\n")
    header = next(csv.reader([data[: end if end >= 0 else len(data)].decode("utf-8-sig")]), [])
    names = [name for name in wanted if name in (column.strip() for column in header)]
    table = pa_csv.read_csv(
        io.BytesIO(data),
        read_options=pa_csv.ReadOptions(column_names=[column.strip() for column in header], skip_rows=1),
        convert_options=pa_csv.ConvertOptions(
            include_columns=names,
            column_types={name: pa.string() for name in names},
            null_values=[""],
            strings_can_be_null=True,
        ),
    )
    return _frame(table)


def _frame(table: pa.Table) -> pd.DataFrame:
    """Convert to pandas."""
    frame: pd.DataFrame = table.to_pandas()
    return frame


def _addresses(table: pd.DataFrame, name: str) -> "pd.Series[str] | None":
    """Full addresses of one kind of file: the URL column where it has a value, else path and file name joined."""
    url = table.get(f"URL_{name}")
    path, file = table.get(f"PathName_{name}"), table.get(f"FileName_{name}")
    joined = None
    if path is not None and file is not None:
        joined = path.str.rstrip("/") + "/" + file.str.lstrip("/")
    if url is None:
        return joined
    return url if joined is None else url.fillna(joined)
