"""The tables of a report: what is read, and the same numbers unrounded."""

from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
import pandas as pd

from coda_ray.config import Granularity
from coda_ray.tracking.published import Cells, published_cells
from coda_ray.tracking.records import FEATURE_SCORES, SCORES
from coda_ray.tracking.table import CELL, OF_SPLIT, cell_text, grid, matrices, seeds_text, shown, title_of

# Of the paper: which methods stand side by side.
AUTOENCODERS = {
    "3": ("the masked autoencoder against DINO", ("dual-dino", "dual-mae", "oda", "oda-mae")),
    "5": ("the masked autoencoder and test-time training", ("dual-mae", "oda-mae", "ttt")),
}
SCORE_NAMES = {
    "replicate_map_controls": "replicates against DMSO (mAP)",
    "replicate_map": "replicates against compounds (mAP)",
    "moa_map": "same MoA (mAP)",
    "ilisi": "batches mix (iLISI)",
    "kbet": "batches mix (kBET)",
    "silhouette_batch": "batches mix (silhouette)",
}


@dataclass(frozen=True)
class Table:
    """One table.

    Parameters
    ----------
    name
        Of its file.
    title
        Above it.
    header, rows
        Text as it is shown; a cell may have several lines.
    data
        The same numbers, unrounded.
    folded
        Whether it is shown on demand.
    """

    name: str
    title: str
    header: list[str]
    rows: list[list[str]]
    data: pd.DataFrame
    folded: bool = False


def score_tables(tidy: pd.DataFrame, kind: str, number: str) -> list[Table]:
    """Lay out one kind of score at every split and granularity, per image, per well and per compound.

    Parameters
    ----------
    tidy
        From `table.job_matrix`.
    kind
        `accuracy` or `macro_f1`.
    number
        Of the paper's table.

    Returns
    -------
    list of Table
        Mean ± standard deviation over seeds in percent; the paper's figure below ours where it printed one.
    """
    metrics = [metric for metric in SCORES if metric.endswith(kind)]
    parts = [(metric, part) for metric in metrics for part in matrices(tidy, metric)]
    return [
        replace(_score_table(part, f"table-{number}", f"Table {number}: "), folded=metric != metrics[0]) for metric, part in parts
    ]


def autoencoder_tables(tidy: pd.DataFrame) -> list[Table]:
    """Lay out the paper's tables 3 and 5, at every split and granularity, where two of their methods or more are there."""
    tables = []
    for number, (words, methods) in AUTOENCODERS.items():
        for part in matrices(tidy, "accuracy"):
            chosen = part[part["method"].isin(methods) & (part["source"] != part["target"])]
            if chosen["method"].nunique() > 1:
                tables.append(_score_table(chosen.reset_index(drop=True), f"table-{number}", f"Table {number}, {words}: "))
    return tables


def granularity_table(transfers: pd.DataFrame, tidy: pd.DataFrame) -> pd.DataFrame:
    """Tabulate accuracy by granularity, on the unit that was adapted to and on the whole target.

    Parameters
    ----------
    transfers
        The job's rows.
    tidy
        Its matrix, from `table.job_matrix`; has the scores on the unit itself.

    Returns
    -------
    DataFrame
        split, granularity, source, target, method, scope (adapted, whole), mean, std, n_seeds, between different sources. A model
        that was adapted to a unit counts on the whole target by the mean over units.
    """
    on_unit = tidy[(tidy["metric"] == "accuracy") & (tidy["source"] != tidy["target"])].assign(scope="adapted")
    whole = transfers[(transfers["scope"] == "whole") & (transfers["source"] != transfers["target"])]
    names = ["split", "granularity", *CELL]
    seeds = whole.groupby([*names, "seed"], as_index=False)["accuracy"].mean()
    on_whole = seeds.groupby(names, as_index=False).agg(
        mean=("accuracy", "mean"), std=("accuracy", "std"), n_seeds=("accuracy", "count")
    )
    columns = [*names, "scope", "mean", "std", "n_seeds"]
    both: pd.DataFrame = pd.concat([on_unit[columns], on_whole.assign(scope="whole")[columns]], ignore_index=True)
    return both


def feature_tables(transfers: pd.DataFrame) -> list[Table]:
    """Lay out the scores of the features on the whole target, one row per transfer, mean ± standard deviation over seeds.

    Several units count by their mean. Nothing is laid out where nothing was measured.
    """
    names = ["split", "source", "target", "granularity", "method"]
    measured = transfers.dropna(subset=list(FEATURE_SCORES), how="all")
    if measured.empty:
        return []
    seeds = measured.groupby([*names, "seed"])[list(FEATURE_SCORES)].mean().groupby(names)
    data = seeds.mean().join(seeds.std().add_suffix("_std")).join(seeds.size().rename("n_seeds")).reset_index()
    orders = {name: shown(data[name].tolist()) for name in names} | {"granularity": list(get_args(Granularity))}
    data = data.sort_values(names, key=lambda column: column.map(orders[str(column.name)].index), ignore_index=True)
    rows = [
        [f"{row['source']} → {row['target']}", row["method"], row["granularity"], row["split"]]
        + [_plain(row[score], row[f"{score}_std"]) for score in FEATURE_SCORES]
        for row in data.to_dict("records")
    ]
    title = f"Scores of the features on the whole target, mean ± std over {seeds_text(data)}"
    header = ["source → target", "method", "adapted per", "split", *[SCORE_NAMES[score] for score in FEATURE_SCORES]]
    return [Table("feature-scores", title, header, rows, data)]


def difference_tables(differences: pd.DataFrame) -> list[Table]:
    """Lay out the paired differences, one table per split and granularity."""
    tables = []
    for (split, granularity), part in differences.groupby(["split", "granularity"], sort=False):
        rows = [
            [
                f"{row['method']} − {row['against']}",
                str(row["target"]),
                f"{100 * row['difference']:+.1f}",
                f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}",
                f"{row['n_images']:,}",
                f"{row['n_wells']:,}",
                str(row["n_seeds"]),
            ]
            for row in part.to_dict("records")
        ]
        title = f"Differences in accuracy (points){OF_SPLIT[str(split)]}, adapted per {granularity}"
        header = ["difference", "target", "points", "95 % interval", "images", "wells", "seeds"]
        tables.append(
            Table(f"differences-table-{granularity}{_suffix(str(split))}", title, header, rows, part.reset_index(drop=True))
        )
    return tables


def data_table(data: pd.DataFrame) -> Table:
    """Lay out what the sources hold."""
    header = ["source", "batches", "plates", "wells", "compounds", "MoAs", "images", "with a MoA", "tile (px)", "pixel (µm)"]
    rows = [[_count(value) for value in row] for row in data.itertuples(index=False, name=None)]
    return Table("data", "What was looked at", header, rows, data)


def _score_table(tidy: pd.DataFrame, name: str, title: str) -> Table:
    """Lay out one matrix; what the paper printed stands below ours."""
    header, rows, means = grid(tidy)
    published = published_cells(tidy)
    methods = header[1:]
    pairs = list(dict.fromkeys(zip(tidy["source"], tidy["target"], strict=True)))
    for row, (source, target) in zip(rows, pairs, strict=True):
        for place, method in enumerate(methods, 1):
            if (cell := published.get((source, target, method))) is not None:
                row[place] += f"\npaper {cell_text(*cell)}"
    metric, granularity, split = (str(tidy[column].iloc[0]) for column in ("metric", "granularity", "split"))
    file = f"{name}-{metric.replace('_', '-')}-{granularity}{_suffix(split)}"
    return Table(file, f"{title}{title_of(tidy)}", header, rows + means, _with_published(tidy, published))


def _with_published(tidy: pd.DataFrame, published: Cells) -> pd.DataFrame:
    """Put the paper's figures into columns of their own, where there are any."""
    if not published:
        return tidy
    nothing = (np.nan, np.nan)
    beside = [published.get(cell, nothing) for cell in tidy[CELL].itertuples(index=False, name=None)]
    return tidy.assign(published_mean=[mean for mean, _ in beside], published_std=[std for _, std in beside])


def _suffix(split: str) -> str:
    """Mark the names of files by their split, as the heat maps are."""
    return "" if split == "plate" else f"-{split}"


def _plain(mean: float, std: float) -> str:
    """Write a score that is no percentage."""
    if np.isnan(mean):
        return "–"
    return f"{mean:.3f} ± {'–' if np.isnan(std) else f'{std:.3f}'}"


def _count(value: object) -> str:
    """Write a number of the table of data."""
    if isinstance(value, float):
        return "–" if np.isnan(value) else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
