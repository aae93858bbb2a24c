"""The index of a plate before its images are read: what the tables alone say its tiles will be."""

import numpy as np
import pandas as pd

from coda_ray.jump.layout import METADATA, PlateName
from coda_ray.jump.tables import Tables, annotate, wells_expected
from coda_ray.tiles.store import TileStore


def planned_index(plate: PlateName, tables: Tables, *, sites_per_well: int, shape: tuple[int, int]) -> pd.DataFrame:
    """Index a plate as its ingest would, if every well were imaged whole and no site were broken.

    Parameters
    ----------
    plate
        Its name.
    tables
        The metadata.
    sites_per_well
        Fields of view of each well.
    shape
        Height and width of a tile (px).

    Returns
    -------
    DataFrame
        Rows of `INDEX_SCHEMA`, well by well; shards, offsets and checksums name no bytes.

    Raises
    ------
    ValueError
        When neither the well table nor the plate layout knows the plate's wells.
    """
    wells = wells_expected(plate, tables)
    if not wells:
        raise ValueError(
            f"metadata: {'/'.join(plate)} has no wells in well.csv.gz and no plate layout; complete the metadata folder, "
            "or run jobs/ingest.py first"
        )
    sites = [(*plate, well, str(site)) for well in wells for site in range(1, sites_per_well + 1)]
    annotated = annotate(pd.DataFrame(sites, columns=list(METADATA)), tables)
    return annotated.assign(
        shard=f"{TileStore.plate_path(*plate)}/planned",
        row=np.arange(len(annotated)),
        offset=0,
        height=shape[0],
        width=shape[1],
        crc32=0,
    )
