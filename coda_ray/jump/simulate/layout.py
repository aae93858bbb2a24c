"""Where things stand in a bucket of the JUMP layout: plates, file names in three vendors' styles, and the lists of images."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from coda_ray.config import CHANNELS
from coda_ray.jump.simulate.settings import SimulateSettings
from coda_ray.jump.simulate.world import generator

GALLERY = "s3://cellpainting-gallery"
DATASET = "cpg0016-jump"
Style = Literal["phenix", "yokogawa", "imagexpress"]
STYLES: tuple[Style, ...] = ("phenix", "yokogawa", "imagexpress")


@dataclass(frozen=True)
class Plate:
    """One plate of one batch.

    Attributes
    ----------
    run
        Number of the batch in its source, from 0.
    channel_numbers
        Number in the file name of DNA, ER, RNA, AGP, Mito.
    """

    source: str
    batch: str
    name: str
    run: int
    style: Style
    channel_numbers: tuple[int, ...]

    @property
    def images(self) -> str:
        """Folder of the images; one vendor's contains a space, another's has a prefix."""
        inside = {
            "phenix": f"{self.name}__2024-05-{self.run + 1:02d}T10_30_00-Measurement 1/Images",
            "yokogawa": f"CPSIM-{self.name}",
            "imagexpress": f"{self.name}/TimePoint_1",
        }[self.style]
        return f"{DATASET}/{self.source}/images/{self.batch}/images/{inside}"

    @property
    def illumination(self) -> str:
        """Folder of the illumination functions."""
        return f"{DATASET}/{self.source}/images/{self.batch}/illum/{self.name}"

    @property
    def lists(self) -> tuple[str, ...]:
        """Paths of the plate's image lists: both layouts, only the old one, or only a compressed current one."""
        folder = f"{DATASET}/{self.source}/workspace"
        current = f"{folder}/load_data_csv/{self.batch}/{self.name}/load_data_with_illum.csv"
        old = f"{folder}/load_data_csv_orig/{self.batch}/{self.name}/load_data_with_illum.parquet"
        return {"phenix": (current, old), "yokogawa": (old,), "imagexpress": (f"{current}.gz",)}[self.style]

    @property
    def compression(self) -> str | None:
        """TIFF compression."""
        return None if self.style == "yokogawa" else "lzw"

    def site_number(self, site: int) -> int:
        """Number of a site in the lists, which one vendor counts from 0."""
        return site if self.style == "imagexpress" else site + 1

    def image_name(self, well: str, site: int, channel: int) -> str:
        """File name of one channel of one site; site and channel count from 0."""
        number = self.channel_numbers[channel]
        if self.style == "phenix":
            row, column = ord(well[0]) - ord("A") + 1, int(well[1:])
            return f"r{row:02d}c{column:02d}f{site + 1:02d}p01-ch{number}sk1fk1fl1.tiff"
        if self.style == "yokogawa":
            return f"{self.name}_{well}_T0001F{site + 1:03d}L01A01Z01C{number:02d}.tif"
        digest = hashlib.sha256(f"{self.name}/{well}/{site}/{number}".encode()).hexdigest().upper()
        guid = "-".join(digest[a:b] for a, b in ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32)))
        return f"{self.name}_{well}_s{site + 1}_w{number}{guid}.tif"

    def illumination_name(self, channel: int) -> str:
        """File name of an illumination function."""
        return f"{self.name}_Illum{CHANNELS[channel]}.npy"


def draw_plates(settings: SimulateSettings) -> list[Plate]:
    """All plates, by source, batch and number; with defects, one has a name of digits only."""
    plates = []
    for index, source in enumerate(settings.sources):
        style = STYLES[index % len(STYLES)]
        numbers = tuple(int(n) for n in generator(settings.seed, "channels", source).permutation(5) + 1)
        count = 0
        for run in range(settings.batches_per_source):
            batches = {"phenix": f"SIM{run + 1:02d}", "yokogawa": f"SIMCPE-2024-Run{run + 1:02d}", "imagexpress": f"J{run + 1}"}
            # One vendor's users reorder the channels between acquisitions.
            turned = numbers[run % 5 :] + numbers[: run % 5] if style == "phenix" else numbers
            for _ in range(1 + run % 2):
                count += 1
                serial = 100 * (index + 1) + count
                name = {"phenix": f"SIMQC{serial:04d}", "yokogawa": f"ASIM{serial:04d}", "imagexpress": f"A1{serial:06d}"}[style]
                if settings.defects and index == len(settings.sources) - 1 and count == 1:
                    name = f"105360{serial:04d}"
                plates.append(Plate(source, batches[style], name, run, style, turned))
    return plates


def wells_per_moa(settings: SimulateSettings, source: str) -> list[int]:
    """Wells of a compound on each plate of a source, by named mechanism; which are frequent follows from the seed."""
    own = [source] if settings.imbalance_by_source else []
    ranks = generator(settings.seed, "imbalance", *own).permutation(settings.moas)
    return [settings.wells_by_rank[rank] for rank in ranks]


def _places(settings: SimulateSettings) -> list[tuple[str, int]]:
    """Give out the wells: name and compound of each, -1 for DMSO.

    First come those of the balanced world without unknown mechanisms. They stand, and look, as they do in that world; the
    others take wells that are free there.
    """
    names = [f"{row}{column:02d}" for row in "ABCDEFGHIJKLMNOP" for column in range(1, 25)]
    each, known = settings.wells_per_compound, settings.known_compounds
    rng = generator(settings.seed, "layout")
    contents = rng.permutation([c for c in range(known) for _ in range(each)] + [-1] * settings.dmso_wells)
    places = sorted(rng.choice(len(names), len(contents), replace=False))
    unknown = [known + c for c in range(settings.unknown_compounds) for _ in range(each)]
    most = np.max([wells_per_moa(settings, source) for source in settings.sources], axis=0)
    frequent = [c for c in range(known) for _ in range(most[c // settings.compounds_per_moa] - each)]
    for kind, more in (("unknown", unknown), ("imbalance", frequent)):
        free = sorted(set(range(len(names))) - set(places))
        places += list(generator(settings.seed, "layout", kind).choice(free, len(more), replace=False))
    return [(names[place], int(content)) for place, content in zip(places, [*contents, *unknown, *frequent], strict=True)]


def draw_wells(settings: SimulateSettings) -> dict[str, int]:
    """Plate layout, one for all sources: well → number of its compound, -1 for DMSO; in order of wells.

    Compounds of unknown mechanisms have the highest numbers. A source may leave wells of the layout empty: see `wells_of`.
    """
    return dict(sorted(_places(settings)))


def wells_of(settings: SimulateSettings, source: str) -> dict[str, int]:
    """Wells of the layout that hold cells on the plates of a source, as `draw_wells` gives them."""
    has_unknown = not settings.unknown_only_in or source in settings.unknown_only_in
    wanted = [n for n in wells_per_moa(settings, source) for _ in range(settings.compounds_per_moa)]
    wanted += [settings.wells_per_compound * has_unknown] * settings.unknown_compounds
    left = dict(enumerate(wanted)) | {-1: settings.dmso_wells}
    filled = {}
    for well, content in _places(settings):
        left[content] -= 1
        if left[content] >= 0:
            filled[well] = content
    return dict(sorted(filled.items()))


def image_list(plate: Plate, wells: Sequence[str], sites: int) -> pd.DataFrame:
    """List the images of a plate: one row per site.

    Returns
    -------
    DataFrame
        Strings: `Metadata_Source`, `_Batch`, `_Plate`, `_Well`, `_Site`, and for each channel `Path_Orig`, `File_Orig`,
        `Path_Illum`, `File_Illum`, from which `current_layout` and `old_layout` make the published columns.
    """
    rows = []
    for well in wells:
        for site in range(sites):
            row = {
                "Metadata_Source": plate.source,
                "Metadata_Batch": plate.batch,
                "Metadata_Plate": plate.name,
                "Metadata_Well": well,
                "Metadata_Site": str(plate.site_number(site)),
            }
            for k, channel in enumerate(CHANNELS):
                row[f"Path_Orig{channel}"] = f"{GALLERY}/{plate.images}/"
                row[f"File_Orig{channel}"] = plate.image_name(well, site, k)
                row[f"Path_Illum{channel}"] = f"{GALLERY}/{plate.illumination}"
                row[f"File_Illum{channel}"] = plate.illumination_name(k)
            rows.append(row)
    return pd.DataFrame(rows)


def old_layout(rows: pd.DataFrame) -> pd.DataFrame:
    """The 25 string columns of 2022: `FileName_`, `PathName_` and five `Metadata_` columns."""
    names = {name: name.replace("Path_", "PathName_").replace("File_", "FileName_") for name in rows.columns}
    table = rows.rename(columns=names).astype(str)
    return table[sorted(table.columns)]


def current_layout(rows: pd.DataFrame, plate: Plate, pixel_um: float, field_px: int) -> pd.DataFrame:
    """The `URL_` columns of 2025, with the vendor's extra columns on some plates.

    Brightfield columns, where a plate has them, name files that are never written: nothing here uses them.
    """
    columns: dict[str, object] = {}
    for kind in ("Orig", "Illum"):
        for channel in reversed(CHANNELS):
            folder = rows[f"Path_{kind}{channel}"].str.rstrip("/")
            columns[f"URL_{kind}{channel}"] = folder + "/" + rows[f"File_{kind}{channel}"]
    if plate.style == "imagexpress" and plate.run == 0:
        original = rows["Path_OrigDNA"] + rows["File_OrigDNA"]
        columns["URL_OrigBrightfield"] = original.str.replace(r"_w\d", "_w6", regex=True)
        columns["URL_IllumBrightfield"] = rows["Path_IllumDNA"] + f"/{plate.name}_IllumBrightfield.npy"
    table = pd.DataFrame(columns)
    for name in ("Source", "Batch", "Plate", "Well", "Site"):
        table[f"Metadata_{name}"] = rows[f"Metadata_{name}"]
    if plate.style == "phenix" and plate.run % 2:
        table["Metadata_AbsPositionZ"] = 0.1346
        table["Metadata_ChannelName"] = "HOECHST 33342"
        table["Metadata_ImageResolutionX"] = pixel_um * 1e-6
        table["Metadata_ImageSizeX"] = field_px
        table["Metadata_FieldID"] = rows["Metadata_Site"]
    return table
