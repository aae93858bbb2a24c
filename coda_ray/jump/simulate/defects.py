"""Defects that real buckets have, planted on request and written down."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from coda_ray.config import CHANNELS
from coda_ray.jump.simulate.layout import GALLERY, Plate
from coda_ray.jump.simulate.settings import SimulateSettings
from coda_ray.jump.simulate.world import generator

# What happens to the bytes of a listed file.
FILE_KINDS = ("zero_filled", "truncated", "missing_file")
LIST_KINDS = ("well_not_listed", "wrong_illumination_name", "partial_plate", "duplicate_rows")
PLATE_KINDS = ("recorded_as_dmso", "no_illumination")
KEPT_OF_PARTIAL = 0.4


@dataclass(frozen=True)
class Defect:
    """One planted defect; fields that do not apply are empty.

    Attributes
    ----------
    site
        As the image list numbers it.
    """

    kind: str
    address: str
    source: str
    plate: str
    well: str = ""
    site: str = ""
    channel: str = ""


def plan_defects(settings: SimulateSettings, plates: Sequence[Plate], wells: Mapping[str, Mapping[str, int]]) -> list[Defect]:
    """Choose where to plant one defect of each kind, spread over the plates; none unless the settings ask for it.

    `wells` maps a source to what `wells_of` gives for it.
    """
    if not settings.defects:
        return []
    rng = generator(settings.seed, "defects")
    order = [plates[i] for i in rng.permutation(len(plates))]
    kinds = FILE_KINDS + LIST_KINDS + PLATE_KINDS
    chosen = [(kind, order[i % len(order)]) for i, kind in enumerate(kinds)]
    planned = [_plan(kind, plate, settings, wells[plate.source], rng) for kind, plate in chosen]
    digits = next(plate for plate in plates if plate.name.isdigit())
    planned.append(Defect("digit_plate_name", f"{GALLERY}/{digits.lists[0]}", digits.source, digits.name))
    return planned


def _plan(kind: str, plate: Plate, settings: SimulateSettings, wells: Mapping[str, int], rng: np.random.Generator) -> Defect:
    """Choose well, site and channel of one defect on a plate."""
    treated = [well for well, content in wells.items() if content >= 0]
    well, site = str(rng.choice(treated)), int(rng.integers(settings.sites_per_well))
    channel, number = int(rng.integers(len(CHANNELS))), str(plate.site_number(site))
    listed = f"{GALLERY}/{plate.lists[0]}"
    if kind in FILE_KINDS:
        address = f"{GALLERY}/{plate.images}/{plate.image_name(well, site, channel)}"
        return Defect(kind, address, plate.source, plate.name, well, number, CHANNELS[channel])
    if kind == "well_not_listed":
        return Defect(kind, listed, plate.source, plate.name, well)
    if kind == "duplicate_rows":
        return Defect(kind, listed, plate.source, plate.name, well, number)
    if kind == "wrong_illumination_name":
        return Defect(kind, listed, plate.source, plate.name, channel=CHANNELS[channel])
    if kind == "recorded_as_dmso":
        return Defect(kind, "metadata/well.csv.gz", plate.source, plate.name, well)
    if kind == "no_illumination":
        return Defect(kind, f"{GALLERY}/{plate.illumination}", plate.source, plate.name)
    return Defect(kind, listed, plate.source, plate.name)


def spoil_list(rows: pd.DataFrame, defects: Sequence[Defect]) -> pd.DataFrame:
    """Plant the defects of one plate's image list.

    Parameters
    ----------
    rows
        From `image_list`.
    defects
        Of this plate; kinds that do not concern the list are passed over.

    Returns
    -------
    DataFrame
    """
    for defect in defects:
        here = rows["Metadata_Well"] == defect.well
        if defect.kind == "well_not_listed":
            rows = rows[~here]
        elif defect.kind == "duplicate_rows":
            rows = pd.concat([rows, rows[here & (rows["Metadata_Site"] == defect.site)]])
        elif defect.kind == "partial_plate":
            rows = rows.iloc[: max(1, int(len(rows) * KEPT_OF_PARTIAL))]
        elif defect.kind == "wrong_illumination_name":
            wrong = f"{defect.plate}_Illum{defect.channel}_v1.npy"
            rows = rows.assign(**{f"File_Illum{defect.channel}": wrong})
        rows = rows.reset_index(drop=True)
    return rows


def spoil_file(data: bytes, kind: str | None) -> bytes | None:
    """Bytes to write for a file with a defect of this kind, or with none; None means that it is not written."""
    if kind == "zero_filled":
        return bytes(len(data))
    if kind == "truncated":
        return data[: len(data) // 3]
    return None if kind == "missing_file" else data
