"""Plate, well, compound, microscope and MoA tables, in the very formats of the real ones; all names are invented."""

import gzip
import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from coda_ray.jump.simulate.layout import Plate, draw_wells
from coda_ray.jump.simulate.settings import SimulateSettings
from coda_ray.jump.simulate.world import Optics, generator

DMSO = "JCP2022_033924"
_DMSO_KEY = "IAZDPXIOMUYVGZ-UHFFFAOYSA-N"
_STARTS = ["bal", "cor", "dex", "fen", "gal", "hil", "jor", "kel", "lum", "mov"]
_STARTS += ["nar", "pel", "quin", "ros", "sel", "tam", "ver", "wol", "xan", "zir"]
_MIDDLES = ["a", "e", "i", "o", "u", "ari", "eno", "ilo", "oma", "ura"]
_DRUG_ENDS = ["tinib", "zole", "mycin", "pride", "statin", "caine", "dopa", "fenac", "mide", "rolol"]
_TARGET_ENDS = ["kin", "rin", "din", "phos", "lase"]
# Of compounds and targets that no table names a mechanism of, so that no name is given twice.
_UNKNOWN_DRUG_ENDS = ["vaptan", "gliptin", "sartan", "parin", "oxacin"]
_UNKNOWN_TARGET_ENDS = ["tor", "gen", "plex"]
_ACTIONS = ("inhibitor", "receptor agonist", "receptor antagonist", "channel blocker", "stabilizing agent", "uptake inhibitor")
_DRUG_COLUMNS = ["pert_iname", "clinical_phase", "moa", "target", "disease_area", "indication"]
_SAMPLE_COLUMNS = ["broad_id", "pert_iname", "qc_incompatible", "purity", "vendor", "catalog_no", "vendor_name"]
_SAMPLE_COLUMNS += ["expected_mass", "smiles", "InChIKey", "pubchem_cid", "deprecated_broad_id"]


@dataclass(frozen=True)
class Compound:
    """One invented compound.

    Attributes
    ----------
    moa
        Its mechanism.
    known
        Whether tables name the mechanism.
    """

    jcp: str
    name: str
    moa: str
    broad_core: str
    inchikey: str
    known: bool


def _letters(text: str, count: int) -> str:
    """Capital letters that depend on a text."""
    return "".join(chr(65 + byte % 26) for byte in hashlib.sha256(text.encode()).digest()[:count])


def _words(rng: np.random.Generator, ends: Sequence[str], count: int) -> list[str]:
    """Distinct invented words."""
    words: dict[str, None] = {}
    while len(words) < count:
        size = 1 + len(words) // 600
        words["".join(str(rng.choice(part)) for part in (*([_STARTS, _MIDDLES] * size), ends))] = None
    return list(words)


def draw_compounds(settings: SimulateSettings) -> list[Compound]:
    """Name mechanisms and compounds; compounds of one mechanism stand together, those of unknown mechanisms last.

    One of the known mechanisms is a composite with `|`.
    """
    rng = generator(settings.seed, "names")
    moas = [f"{word} {rng.choice(_ACTIONS)}" for word in _words(rng, _TARGET_ENDS, settings.moas)]
    moas[-1] = f"{moas[-1]}|{moas[-1].split()[0]} modulator"
    names = _words(rng, _DRUG_ENDS, settings.known_compounds)
    cores = list(rng.choice(90_000_000, len(names), replace=False) + 10_000_000)
    rng = generator(settings.seed, "unknown names")
    moas += [f"{word} {rng.choice(_ACTIONS)}" for word in _words(rng, _UNKNOWN_TARGET_ENDS, settings.unknown_moas)]
    names += _words(rng, _UNKNOWN_DRUG_ENDS, settings.unknown_compounds)
    cores += list(rng.choice(8_000_000, settings.unknown_compounds, replace=False) + 2_000_000)
    compounds = []
    for i, name in enumerate(names):
        key = f"{_letters(name, 14)}-{_letters(name + 'x', 8)}SA-N"
        moa, known = moas[i // settings.compounds_per_moa], i < settings.known_compounds
        compounds.append(Compound(f"JCP2022_{100_001 + 37 * i:06d}", name, moa, f"BRD-K{cores[i]:08d}", key, known))
    return compounds


def _csv_gz(table: pd.DataFrame) -> bytes:
    """Compressed CSV whose bytes depend on the table alone."""
    return gzip.compress(table.to_csv(index=False).encode(), mtime=0)


def _tab(rows: Iterable[Sequence[object]], end: str = "\n") -> str:
    """Tab-separated lines without quoting."""
    return "".join("\t".join(str(cell) for cell in row) + end for row in rows)


def _comments(what: str, width: int) -> list[list[str]]:
    """The `!` lines above a Repurposing-Hub-like table."""
    lines = (("!Source", '"coda_ray simulator"'), ("!Table_name", what), ("!Disclaimer", "Invented compounds and mechanisms."))
    return [[*line, *[""] * (width - 2)] for line in lines]


def _moa_tables(settings: SimulateSettings, compounds: Sequence[Compound]) -> dict[str, bytes]:
    """The four inputs of the MoA rule."""
    meta: list[list[object]] = [
        ["broad_sample", "InChIKey", "pert_iname", "pubchem_cid", "target_list", "pert_type", "control_type", "smiles", "InChI"]
    ]
    drugs, samples = _comments("drug information", 6), _comments("sample information", 12)
    drugs.append(_DRUG_COLUMNS)
    samples.append(_SAMPLE_COLUMNS)
    for i, c in enumerate(compounds):
        cid = str(900_000 + i)
        meta.append([f"{c.broad_core}-001-01-1", c.inchikey, c.name, cid, "NA", "trt", "NA", "", ""])
        if not c.known and i % 2:
            continue  # The hub lists every second of them, without a mechanism.
        use = ["otology", "Ménière's disease"] if i % 5 == 0 else ["", ""]
        drugs.append([c.name, "Preclinical", c.moa if c.known else "", "", *use])
        # A compound has been bought more than once, as other salts and lots.
        for lot in range(1, 2 + i % 3):
            sample = [f"{c.broad_core}-00{lot}-0{lot}-{lot}", c.name, "0", "98.1", "Simulated", f"S{i:04d}", f'{c.name} 5" vial']
            samples.append([*sample, "300.1", "", c.inchikey, cid, ""])
    rng = generator(settings.seed, "elsewhere")
    moas = [c.moa for c in compounds if c.known]
    for i, word in enumerate(_words(rng, ["quat", "xine"], 12)):
        # The hub knows drugs that no plate holds, some without a mechanism.
        drugs.append([word, "Launched", "" if i % 3 == 0 else moas[i % len(moas)], "", "", ""])
        core = f"BRD-K{1_000_000 + 7 * i:08d}"
        sample = [f"{core}-001-01-1", word, "0", "97", "Simulated", f"E{i:04d}", word, "300.1", ""]
        samples.append([*sample, f"{_letters(word, 14)}-{_letters(word + 'x', 8)}SA-N", "", ""])
    meta.append(["NA", _DMSO_KEY, "DMSO", "679", "NA", "control", "negcon", "C[S+](C)[O-]", "InChI=1S/C2H6OS/c1-4(2)3/h1-2H3"])
    platemap = [["well_position", "broad_sample", "solvent"]]
    layout = draw_wells(settings)
    platemap += [[well, f"{compounds[c].broad_core}-001-01-1" if c >= 0 else "", "DMSO"] for well, c in layout.items()]
    return {
        "compound_metadata.tsv": _tab(meta).encode(),
        "compound_platemap.tsv": _tab(platemap).encode(),
        "repurposing_drugs.txt": _tab(drugs, "\r\n").encode("latin-1"),
        "repurposing_samples.txt": _tab(samples, "\r\n").encode("latin-1"),
    }


def metadata_files(
    settings: SimulateSettings,
    plates: Sequence[Plate],
    wells: Mapping[str, Mapping[str, int]],
    compounds: Sequence[Compound],
    microscopes: Mapping[str, Optics],
    recorded_as_dmso: set[tuple[str, str]],
) -> dict[str, bytes]:
    """Write every table.

    Parameters
    ----------
    settings, plates, wells, compounds, microscopes
        The world; `wells` maps a source to what `wells_of` gives for it.
    recorded_as_dmso
        (plate, well) pairs that the well table wrongly gives as DMSO.

    Returns
    -------
    dict of str to bytes
        File name → content.
    """
    plate_rows = [(p.source, p.batch, p.name, "TARGET2") for p in plates]
    well_rows = [
        (p.source, p.name, well, DMSO if c < 0 or (p.name, well) in recorded_as_dmso else compounds[c].jcp)
        for p in plates
        for well, c in wells[p.source].items()
    ]
    compound_rows = sorted([(c.jcp, c.inchikey) for c in compounds] + [(DMSO, _DMSO_KEY)])
    scopes = [
        {
            "Metadata_Source": source,
            "Metadata_Microscope_Name": o.microscope,
            "Metadata_Widefield_vs_Confocal": "Confocal" if o.confocal else "Widefield",
            "Metadata_Excitation_Type": o.excitation,
            "Metadata_Objective_NA": round(o.numerical_aperture, 6),
            "Metadata_N_Brightfield_Planes_Min": 0,
            "Metadata_N_Brightfield_Planes_Max": 0,
            "Metadata_Distance_Between_Z_Microns": "",
            "Metadata_Sites_Per_Well": settings.sites_per_well,
            "Metadata_Filter_Configuration": "S",
            "Metadata_Pixel_Size_Microns": round(o.pixel_um, 6),
        }
        for source, o in microscopes.items()
    ]
    control = pd.DataFrame(
        [("JCP2022_999999", "empty", "Empty", "any"), (DMSO, "negcon", "DMSO", "compound")],
        columns=["Metadata_JCP2022", "Metadata_pert_type", "Metadata_Name", "Metadata_modality"],
    )
    plate_columns = ["Metadata_Source", "Metadata_Batch", "Metadata_Plate", "Metadata_PlateType"]
    well_columns = ["Metadata_Source", "Metadata_Plate", "Metadata_Well", "Metadata_JCP2022"]
    scope_table, control_table = io.StringIO(), io.StringIO()
    pd.DataFrame(scopes).to_csv(scope_table, index=False)
    control.to_csv(control_table, index=False)
    return {
        "plate.csv.gz": _csv_gz(pd.DataFrame(plate_rows, columns=plate_columns)),
        "well.csv.gz": _csv_gz(pd.DataFrame(well_rows, columns=well_columns)),
        "compound.csv.gz": _csv_gz(pd.DataFrame(compound_rows, columns=["Metadata_JCP2022", "Metadata_InChIKey"])),
        "perturbation_control.csv": control_table.getvalue().encode(),
        "microscope_config.csv": scope_table.getvalue().encode(),
        **_moa_tables(settings, compounds),
    }
