"""Plate, well, compound, control and microscope tables of JUMP, and what they say about each listed site."""

import gzip
import io
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from coda_ray.jump.layout import METADATA, PlateName
from coda_ray.jump.moa import labels_by_well, read_hub_table
from coda_ray.storage import Folder
from coda_ray.tiles.store import COMPOUND, LABEL

INCHIKEY, CONTROL = "Metadata_InChIKey", "Metadata_Control"
ANNOTATIONS = (COMPOUND, INCHIKEY, CONTROL, LABEL)
# The one layout that the MoA rule speaks of.
LABELLED_PLATE_TYPE = "TARGET2"
NEGATIVE_CONTROL = "negcon"
UNTREATED = (NEGATIVE_CONTROL, "empty")
MOA_FILES = {
    "platemap": ("JUMP-Target-2_compound_platemap.tsv", "compound_platemap.tsv"),
    "samples": ("JUMP-Target-2_compound_metadata.tsv", "compound_metadata.tsv"),
    "hub_drugs": ("repurposing_drugs_20200324.txt", "repurposing_drugs.txt"),
    "hub_samples": ("repurposing_samples_20200324.txt", "repurposing_samples.txt"),
}


@dataclass(frozen=True)
class Tables:
    """The metadata of a data set; a table that was not found is empty.

    Parameters
    ----------
    plates
        `Metadata_Source`, `Metadata_Batch`, `Metadata_Plate`, `Metadata_PlateType`; one row per plate.
    wells
        `Metadata_Source`, `Metadata_Plate`, `Metadata_Well`, `Metadata_JCP2022`; one row per well.
    inchikeys
        JCP2022 id → InChIKey.
    controls
        JCP2022 id → kind of control (negcon, poscon, empty).
    dmso
        JCP2022 id of DMSO, None where the control table does not name it.
    pixel_sizes
        Source → size of a raw pixel (µm).
    layout
        The labelled layout: `Metadata_Well`, `InChIKey`, `Metadata_MoA`.
    notes
        What is missing and what follows from it, for people.
    """

    plates: pd.DataFrame
    wells: pd.DataFrame
    inchikeys: Mapping[str, str]
    controls: Mapping[str, str]
    dmso: str | None
    pixel_sizes: Mapping[str, float]
    layout: pd.DataFrame
    notes: tuple[str, ...]


def read_tables(folder: Folder) -> Tables:
    """Read every table of the metadata folder.

    Parameters
    ----------
    folder
        Holds `plate.csv.gz`, `well.csv.gz`, `compound.csv.gz`, `perturbation_control.csv`, `microscope_config.csv` (the
        names of jump-cellpainting/datasets, each with or without .gz), and the four inputs of the MoA rule.

    Returns
    -------
    Tables

    Raises
    ------
    ValueError
        When a table cannot be unpacked, lacks a column or lists its key twice with different content.
    """
    notes: list[str] = []
    plates = _table(folder, "plate.csv", (*METADATA[:3], "Metadata_PlateType"), METADATA[:3])
    wells = _table(folder, "well.csv", (METADATA[0], METADATA[2], METADATA[3], COMPOUND), (METADATA[0], METADATA[2], METADATA[3]))
    compounds = _table(folder, "compound.csv", (COMPOUND, INCHIKEY), (COMPOUND,))
    controls = _table(folder, "perturbation_control.csv", (COMPOUND, "Metadata_pert_type", "Metadata_Name"), (COMPOUND,))
    scopes = _table(folder, "microscope_config.csv", (METADATA[0], "Metadata_Pixel_Size_Microns"), (METADATA[0],))
    dmso = controls.loc[controls["Metadata_Name"].str.upper() == "DMSO", COMPOUND].tolist()
    return Tables(
        plates,
        wells,
        _mapping(compounds, INCHIKEY),
        _mapping(controls, "Metadata_pert_type"),
        dmso[0] if dmso else None,
        _pixel_sizes(scopes, folder.address("microscope_config.csv")),
        _read_layout(folder, notes),
        tuple(notes),
    )


def _pixel_sizes(scopes: pd.DataFrame, address: str) -> dict[str, float]:
    """Read the size of a pixel (µm) of each source that has one."""
    named = scopes.dropna()
    sizes = pd.to_numeric(named["Metadata_Pixel_Size_Microns"], errors="coerce")
    for source, told in named[~(sizes > 0)].itertuples(index=False):
        raise ValueError(f"{address}: {source}: Metadata_Pixel_Size_Microns = {told!r} is no size of a pixel; correct it (µm)")
    return dict(zip(named[METADATA[0]], sizes.astype(float), strict=True))


def choose_plates(
    plates: pd.DataFrame, sources: Sequence[str], plate_types: Sequence[str], names: Sequence[str]
) -> list[PlateName]:
    """Choose plates from the plate table.

    Parameters
    ----------
    plates
        The plate table.
    sources, plate_types, names
        What to take; empty means all.

    Returns
    -------
    list of PlateName
        Sorted.

    Raises
    ------
    ValueError
        When a name is not in the table, or nothing is left.
    """
    chosen = plates
    for column, wanted, option in (
        ("Metadata_PlateType", plate_types, "ingest.plate_types"),
        ("Metadata_Source", sources, "ingest.sources"),
        ("Metadata_Plate", names, "ingest.plates"),
    ):
        known = set(chosen[column])
        unknown = [name for name in wanted if name not in known]
        if unknown:
            some = ", ".join(sorted(map(str, known))[:8]) or "none"
            raise ValueError(f"{option} = {unknown[0]!r}: the plate table has no such plate; it has: {some}")
        if wanted:
            chosen = chosen[chosen[column].isin(wanted)]
    if not len(chosen):
        raise ValueError("metadata: plate.csv.gz is missing or empty; give the folder of the plate table as metadata.address")
    return sorted(PlateName(*row) for row in chosen[list(METADATA[:3])].itertuples(index=False))


def annotate(sites: pd.DataFrame, tables: Tables) -> pd.DataFrame:
    """Add compound, InChIKey, kind of control and MoA label to the listed sites of one plate.

    The well table decides which compound a well holds; where it does not know the plate, the plate layout does, through the
    InChIKey. The label follows the well of the layout, except where the well is recorded as untreated: it has none.
    Values that the list itself gives in columns of these names come first.

    Parameters
    ----------
    sites
        Rows of one plate with the five `Metadata_` columns.
    tables
        The metadata.

    Returns
    -------
    DataFrame
        The same rows in the same order, with the columns `ANNOTATIONS`.
    """
    plate = tuple(sites.iloc[0][list(METADATA[:3])])
    layout = _layout_of_plate(plate, tables)
    recorded = wells_of_plate(plate[0], plate[2], tables)
    well = sites["Metadata_Well"]
    keys = layout["InChIKey"]
    if recorded.empty and len(keys):
        recorded = keys.map({key: jcp for jcp, key in tables.inchikeys.items()})
        recorded = recorded.where(keys.notna(), tables.dmso)
    compound = _first(sites, COMPOUND, well.map(recorded))
    control = _first(sites, CONTROL, compound.map(tables.controls))
    label = well.map(layout[LABEL]).mask(control.isin(UNTREATED))
    columns = {
        COMPOUND: compound,
        INCHIKEY: _first(sites, INCHIKEY, compound.map(tables.inchikeys)),
        CONTROL: control,
        LABEL: _first(sites, LABEL, label),
    }
    return sites.assign(**{name: values.astype("str") for name, values in columns.items()})


def wells_of_plate(source: str, plate: str, tables: Tables) -> "pd.Series[str]":
    """Compound of each recorded well of a plate, by well; empty where the well table does not know the plate."""
    here = (tables.wells["Metadata_Source"] == source) & (tables.wells["Metadata_Plate"] == plate)
    return tables.wells[here].set_index("Metadata_Well")[COMPOUND]


def wells_expected(plate: PlateName, tables: Tables) -> list[str]:
    """Name the wells of a plate before its images are seen: those of the well table, else those of the plate layout.

    Returns
    -------
    list of str
        Sorted; empty where neither table knows the plate.
    """
    recorded = wells_of_plate(plate.source, plate.plate, tables)
    return sorted(recorded.index if len(recorded) else _layout_of_plate(plate, tables).index)


def well_notes(sites: pd.DataFrame, annotated: pd.DataFrame, tables: Tables) -> list[str]:
    """Say which wells the image list of a plate lacks, and which are recorded as untreated against the layout.

    Parameters
    ----------
    sites, annotated
        Rows of one plate, before and after `annotate`.
    tables
        The metadata.

    Returns
    -------
    list of str
        Notes for people; empty where nothing is unusual.
    """
    plate = tuple(sites.iloc[0][list(METADATA[:3])])
    layout = _layout_of_plate(plate, tables)
    recorded = wells_of_plate(plate[0], plate[2], tables)
    listed = sites.drop_duplicates(["Metadata_Well", "Metadata_Site"])["Metadata_Well"].value_counts()
    absent = sorted(set(recorded.index) - set(listed.index))
    notes = [f"{len(absent)} of {len(recorded)} wells are not in the image list ({_some(absent)})"] if absent else []
    short = sorted(listed.index[listed < listed.max()])
    if short:
        notes.append(f"{len(short)} wells list fewer than {listed.max()} sites ({_some(short)})")
    treated = set(layout.index[layout["InChIKey"].notna()])
    untreated = annotated.loc[annotated[CONTROL].isin(UNTREATED), "Metadata_Well"]
    against = sorted(treated & set(untreated) - set(layout.index[layout["InChIKey"] == tables.inchikeys.get(tables.dmso or "")]))
    if against:
        notes.append(f"{len(against)} wells are recorded as untreated against the layout and get no label ({_some(against)})")
    return notes


def _layout_of_plate(plate: Sequence[str], tables: Tables) -> pd.DataFrame:
    """Index the labelled layout by well where the plate has it, else give no rows."""
    here = (tables.plates[list(METADATA[:3])] == list(plate)).all(axis=1)
    has_layout = (tables.plates.loc[here, "Metadata_PlateType"] == LABELLED_PLATE_TYPE).any()
    layout = tables.layout if has_layout else tables.layout.iloc[:0]
    return layout.set_index("Metadata_Well")


def _first(sites: pd.DataFrame, column: str, otherwise: "pd.Series[str]") -> "pd.Series[str]":
    """Take a column of the list itself, filled up by what the tables say."""
    return sites[column].astype("str").fillna(otherwise.astype("str")) if column in sites else otherwise


def _some(names: Sequence[str]) -> str:
    """Join the first few names."""
    return ", ".join(names[:6]) + (", …" if len(names) > 6 else "")


def _mapping(table: pd.DataFrame, column: str) -> dict[str, str]:
    """JCP2022 id → value."""
    return dict(table[[COMPOUND, column]].dropna().itertuples(index=False, name=None))


def _read_either(folder: Folder, name: str) -> tuple[str, bytes] | None:
    """Read a file that may be compressed; None where neither is there."""
    for path in (f"{name}.gz", name):
        try:
            data = folder.read(path)
        except FileNotFoundError:
            continue
        try:
            return path, gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{folder.address(path)}: cannot be unpacked ({error}); copy it again") from error
    return None


def _table(folder: Folder, name: str, columns: Sequence[str], key: Sequence[str]) -> pd.DataFrame:
    """Read the columns of a table as strings and check that its key names one row."""
    found = _read_either(folder, name)
    if found is None:
        return pd.DataFrame({column: pd.Series(dtype="str") for column in columns})
    path, data = found
    table = pd.read_csv(io.BytesIO(data), dtype="str", keep_default_na=False, na_values=[""])
    lacking = [column for column in columns if column not in table]
    if lacking:
        raise ValueError(f"{folder.address(path)}: has no column {lacking[0]}; take the table of jump-cellpainting/datasets")
    table = table[list(columns)].drop_duplicates()
    twice = table[table.duplicated(list(key))]
    if len(twice):
        row = ", ".join(map(str, twice.iloc[0][list(key)]))
        raise ValueError(f"{folder.address(path)}: {row} has two rows that disagree; keep one of them")
    return table.reset_index(drop=True)


def _read_layout(folder: Folder, notes: list[str]) -> pd.DataFrame:
    """Label the wells by the MoA rule where all four inputs are there, else note what is missing."""
    found = {}
    for role, names in MOA_FILES.items():
        file = next((file for file in (_read_either(folder, name) for name in names) if file), None)
        if file is None:
            notes.append(f"no MoA labels: {folder.address(names[0])} is not there (README: where to get it)")
            return pd.DataFrame({name: pd.Series(dtype="str") for name in ("Metadata_Well", "InChIKey", LABEL)})
        found[role] = file[1]
    return labels_by_well(
        _tab_separated(found["platemap"]),
        _tab_separated(found["samples"]),
        read_hub_table(found["hub_drugs"]),
        read_hub_table(found["hub_samples"]),
    )


def _tab_separated(data: bytes) -> pd.DataFrame:
    """Read a table of JUMP-Target: UTF-8, "NA" and nothing both mean missing."""
    return pd.read_csv(io.BytesIO(data), sep="\t", dtype="str", keep_default_na=False, na_values=["", "NA"])
