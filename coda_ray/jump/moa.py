"""Mechanism-of-action labels of a TARGET2 plate, by the rule that gives the CODA paper's 54 classes and 135 compounds.

The labels derive from the Drug Repurposing Hub, whose files are for non-commercial use and may not be passed on: this is
the rule alone, applied to the user's own copy of the files.
"""

import io

import pandas as pd

# Leading part of a Broad id, such as BRD-K12345678, that names the compound; the rest names salt, vendor and lot.
CORE_ID_LENGTH = 13
MIN_SAMPLES_PER_LABEL = 2


def read_hub_table(data: bytes) -> pd.DataFrame:
    """Read a file of the Drug Repurposing Hub.

    Parameters
    ----------
    data
        Content of `repurposing_drugs_*.txt` or `repurposing_samples_*.txt`: tab-separated, latin-1, quotes without
        meaning, leading lines that start with `!`.

    Returns
    -------
    DataFrame
        All columns as strings; empty cells are missing values.
    """
    # Not `splitlines`: two rows of the samples of 2020-03-24 hold a vertical tab.
    lines = data.decode("latin-1").replace("\r\n", "\n").split("\n")
    text = "\n".join(line for line in lines if not line.startswith("!"))
    return pd.read_csv(io.StringIO(text), sep="\t", dtype="str", quoting=3, keep_default_na=False, na_values=[""])


def labels_by_well(
    platemap: pd.DataFrame, samples: pd.DataFrame, hub_drugs: pd.DataFrame, hub_samples: pd.DataFrame
) -> pd.DataFrame:
    """Label the wells of a plate layout by mechanism of action.

    Labels are by well, not by compound id, because several ids stand for a labelled and an unlabelled sample. The whole
    `moa` cell is one label; a label is kept where at least two samples of the layout carry it.

    Parameters
    ----------
    platemap
        `well_position`, `broad_sample`; an empty sample is a DMSO well.
    samples
        `broad_sample`, `InChIKey`: the compounds of the layout.
    hub_drugs
        `pert_iname`, `moa`: drugs of the Drug Repurposing Hub.
    hub_samples
        `broad_id`, `pert_iname`: samples of the Drug Repurposing Hub.

    Returns
    -------
    DataFrame
        One row per well of the platemap: `Metadata_Well`, `InChIKey`, `Metadata_MoA`; missing where there is none.

    Raises
    ------
    ValueError
        When a well or a sample is listed twice, or a sample would get two labels.

    Notes
    -----
    Source: CODA (WACV 2024), section 4.1, with the Drug Repurposing Hub of 2020-03-24; the paper states the numbers of
    classes and compounds, the rule was reconstructed from them.
    """
    known = hub_samples.merge(hub_drugs[["pert_iname", "moa"]].dropna(), on="pert_iname")
    known = known.assign(core=known["broad_id"].str[:CORE_ID_LENGTH])[["core", "moa"]].drop_duplicates()
    own = samples[["broad_sample", "InChIKey"]].dropna(subset="broad_sample").drop_duplicates()
    own = own.assign(core=own["broad_sample"].str[:CORE_ID_LENGTH])
    _check_unique(platemap, "well_position", "plate layout")
    _check_unique(own, "broad_sample", "compound metadata of the plate layout")
    _check_unique(known[known["core"].isin(own["core"])], "core", "Drug Repurposing Hub (two mechanisms for one sample)")
    own = own.merge(known, on="core", how="left", validate="many_to_one")
    counts = own["moa"].value_counts()
    own["Metadata_MoA"] = own["moa"].where(own["moa"].map(counts).ge(MIN_SAMPLES_PER_LABEL))
    wells = platemap[["well_position", "broad_sample"]].rename(columns={"well_position": "Metadata_Well"})
    labelled = wells.merge(own, on="broad_sample", how="left", validate="many_to_one")
    return labelled[["Metadata_Well", "InChIKey", "Metadata_MoA"]]


def _check_unique(frame: pd.DataFrame, column: str, what: str) -> None:
    """Refuse a table whose key is not one."""
    twice = frame.loc[frame[column].duplicated(), column]
    if len(twice):
        raise ValueError(f"{what}: {column} = {twice.iloc[0]!r} is listed more than once; keep one row of each")
