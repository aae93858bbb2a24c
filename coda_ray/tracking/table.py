"""The tables of results: one row per transfer, and the source x target matrix with its spread over seeds."""

import re
from collections.abc import Mapping, Sequence
from itertools import chain, product
from typing import Any, get_args

import numpy as np
import pandas as pd
import pyarrow as pa
from rich.table import Table

from coda_ray.config import Granularity, Split
from coda_ray.methods import NAMES, PER_UNIT, model_with, row_of
from coda_ray.storage import Folder
from coda_ray.tiles.store import table_bytes
from coda_ray.tracking.records import SCORES, read_records, transfers_frame

MATRIX_COLUMNS = ("metric", "split", "granularity", "source", "target", "method", "mean", "std", "n_seeds")
CELL = ["source", "target", "method"]
# Scores that methods are ranked by.
RANKED = ("accuracy", "well_accuracy", "compound_accuracy")
_WITH_STD = [f"{metric}{end}" for metric in RANKED for end in ("", "_std")]
RANKING_COLUMNS = ("split", "granularity", "method", "pairs", *_WITH_STD, "gap_closed", "uses")
# Heads the column that says what a method learns from.
USES = "learns from"
# Begins the columns that hold the score of one seed.
SEED = "seed_"
# What titles say of a split.
OF_SPLIT: dict[str, str] = {"plate": "", "compounds": ", compounds held out", "new-compounds": ", new compounds"}
TITLES = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "well_accuracy": "accuracy per well",
    "well_macro_f1": "macro-F1 per well",
    "compound_accuracy": "accuracy per compound",
    "compound_macro_f1": "macro-F1 per compound",
}


def compile_transfers(results: Folder) -> pd.DataFrame:
    """Collect every transfer of a results folder and write `transfers.parquet`.

    Parameters
    ----------
    results
        The results folder; `transfers/<key>.json` are read, many at a time.

    Returns
    -------
    DataFrame
        One row per transfer, as `records.transfers_frame` lays it out. The file holds the same.

    Raises
    ------
    ValueError
        When a record is damaged.
    """
    transfers = transfers_frame(read_records(results, "transfers"))
    results.write("transfers.parquet", table_bytes(pa.Table.from_pandas(transfers, preserve_index=False)))
    return transfers


def job_matrix(transfers: pd.DataFrame, job: Mapping[str, Any]) -> pd.DataFrame:
    """Tabulate every score at every split and granularity of one job.

    Parameters
    ----------
    transfers
        As `compile_transfers` returns it.
    job
        The job's record; its `transfers` name the rows that count.

    Returns
    -------
    DataFrame
        The rows of `matrix_table` for all scores, splits and granularities, one below the other.
    """
    own = transfers[transfers["key"].isin(job["transfers"])]
    across = own[(own["source"] != own["target"]) & own["method"].isin(PER_UNIT)]
    # A job with nothing adapted (only in-domain scores, or unadapted methods) has one table all the same.
    granularities = [g for g in get_args(Granularity) if g in set(across["granularity"])] or ["source"]
    splits = [s for s in get_args(Split) if s in set(own["split"])]
    wanted = product(splits, granularities, SCORES)
    return pd.concat([matrix_table(own, metric, granularity, split) for split, granularity, metric in wanted], ignore_index=True)


def matrix_table(transfers: pd.DataFrame, metric: str, granularity: Granularity, split: Split = "plate") -> pd.DataFrame:
    """Tabulate one score: mean and standard deviation over seeds for every source, target and method.

    Between two sources, an adapted method has, at granularity `source`, its score on the whole target; at `batch`
    and `plate`, the mean over units of the score of the model that was adapted to the unit, weighted by images
    (scores per well or compound: by those), and only for seeds that have every unit. A method that is not fitted to units
    (supervised, dual models, ttt, ...) has the score on the whole target at every granularity. A source with itself is
    scored on its held-out plate.

    Parameters
    ----------
    transfers
        Rows of one job (one result per transfer), as `compile_transfers` returns them.
    metric
        One of `records.SCORES`.
    granularity
        Unit of adaptation.
    split
        What was held out.

    Returns
    -------
    DataFrame
        Columns `MATRIX_COLUMNS`: mean and std as shares in [0, 1], std that of a sample (NaN with one seed); after them
        the score of each seed, `seed_<number>` (NaN where it has none).
        Sorted by source and target (numbers in names by value) and by method, unadapted first.

    Raises
    ------
    ValueError
        When the metric is not known, or one transfer has several results.
    """
    if metric not in SCORES:
        raise ValueError(f"metric = {metric!r}: choose from {', '.join(SCORES)}")
    rows = rows_that_count(transfers[transfers["split"] == split], granularity)
    _refuse_doubles(rows)
    weight = {"well": "n_wells", "compound": "n_compounds"}.get(metric.partition("_")[0], "n_images")
    rows = rows.assign(weighted=rows[metric] * rows[weight], weight=rows[weight])
    seeds = rows.groupby([*CELL, "seed"], as_index=False)[["weighted", "weight"]].sum()
    seeds["score"] = seeds["weighted"] / seeds["weight"]
    by_seed = seeds.pivot(index=CELL, columns="seed", values="score").add_prefix(SEED)
    spread = {"mean": by_seed.mean(axis=1), "std": by_seed.std(axis=1), "n_seeds": by_seed.count(axis=1)}
    table = by_seed.assign(metric=metric, split=split, granularity=granularity, **spread).reset_index()
    order = (
        [*map(_natural, table["source"])],
        [*map(_natural, table["target"])],
        [*map(_method_rank, table["method"])],
    )
    table = table.iloc[sorted(range(len(table)), key=lambda i: tuple(column[i] for column in order))]
    return table.reset_index(drop=True).loc[:, [*MATRIX_COLUMNS, *by_seed.columns]]


def shown(names: Sequence[str]) -> list[str]:
    """Distinct names of sources or methods in the order of every table and figure."""
    return sorted(set(names), key=lambda name: (_method_rank(name), _natural(name)))


def mean_scores(tidy: pd.DataFrame) -> dict[str, float]:
    """Average accuracy and macro-F1 of each method over the pairs of different sources that every method was scored on.

    Parameters
    ----------
    tidy
        From `job_matrix`.

    Returns
    -------
    dict
        `mean_<metric>/<method>`, where it applies with ` per batch` or ` per plate` and ` compounds held out` or
        ` new compounds`, to a share in [0, 1]; NaN where there is no such pair.
    """
    found: dict[str, float] = {}
    for metric in ("accuracy", "macro_f1"):
        for part in matrices(tidy, metric):
            granularity, split = part["granularity"].iloc[0], part["split"].iloc[0]
            unit = "" if granularity == "source" else f" per {granularity}"
            held_out = OF_SPLIT[split].removeprefix(",")
            means = _over_pairs(part)[1]
            found |= {f"mean_{metric}/{method}{unit}{held_out}": round(mean, 6) for method, (mean, _) in means.items()}
    return found


def _over_pairs(tidy: pd.DataFrame) -> tuple[int, dict[str, tuple[float, float]]]:
    """Average each method over the pairs of different sources that every method was scored on.

    Returns the number of pairs, and method to (mean, standard deviation of it over the seeds that have all pairs).
    """
    methods = shown(tidy["method"].tolist())
    scores = ["mean", *[name for name in map(str, tidy) if name.startswith(SEED)]]
    across = tidy[tidy["source"] != tidy["target"]].pivot(index=["source", "target"], columns="method", values=scores)
    across = across.reindex(columns=pd.MultiIndex.from_product([scores, methods]))
    whole = across.dropna(subset=[("mean", method) for method in methods])
    means = whole.mean(skipna=False).unstack()
    spread = means.drop("mean").std()
    return len(whole), dict(zip(methods, zip(means.loc["mean", methods], spread[methods], strict=True), strict=True))


def ranking(tidy: pd.DataFrame) -> list[pd.DataFrame]:
    """Rank the methods of a job by their means over the pairs of different sources, per image, per well and per compound.

    Parameters
    ----------
    tidy
        From `job_matrix`.

    Returns
    -------
    list of DataFrame
        One per split and granularity that has such a pair. Columns `RANKING_COLUMNS`, a row per method, the best per image first;
        scores are shares in [0, 1]. `gap_closed`: of the gap between the accuracy of the supervised model on its own source's
        held-out plates and on other sources, the share that a method closes (NaN without a supervised model, or without a gap).
        `uses`: `compounds` where the method learns from pairs of images of one compound on the target.
    """
    tables = []
    for part in matrices(tidy, "accuracy"):
        split, granularity = part["split"].iloc[0], part["granularity"].iloc[0]
        same = tidy[(tidy["split"] == split) & (tidy["granularity"] == granularity)]
        scores = {metric: _over_pairs(same[same["metric"] == metric]) for metric in RANKED}
        pairs, accuracy = scores["accuracy"]
        if not pairs:
            continue
        least, most = _ends_of_gap(part, accuracy)
        rows = [
            [
                split, granularity, method, pairs, *chain(*(scores[metric][1][method] for metric in RANKED)),
                (mean - least) / (most - least) if most > least else np.nan, "compounds" if row_of(method).pairs else "",
            ]
            for method, (mean, _) in accuracy.items()
        ]  # fmt: skip
        table = pd.DataFrame(rows, columns=list(RANKING_COLUMNS))
        tables.append(table.sort_values("accuracy", ascending=False, kind="stable", ignore_index=True))
    return tables


def _ends_of_gap(part: pd.DataFrame, means: Mapping[str, tuple[float, float]]) -> tuple[float, float]:
    """Take the supervised model's accuracy on other sources and on its own; NaN where it is not in the matrix."""
    supervised = model_with(None).name
    own = part[(part["source"] == part["target"]) & (part["method"] == supervised)]["mean"]
    return means.get(supervised, (np.nan, np.nan))[0], float(own.mean()) if len(own) else np.nan


def ranking_rows(table: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Write one table of `ranking` as text: header and rows, in percent."""
    header = ["method", "per image", "per well", "per compound", "gap closed", USES]
    rows = []
    for row in table.to_dict("records"):
        scores = [cell_text(row[metric], row[f"{metric}_std"]) for metric in RANKED]
        closed = "–" if pd.isna(row["gap_closed"]) else f"{100 * row['gap_closed']:.0f} %"
        uses = "pairs of one compound" if row["uses"] else ""
        rows.append([row["method"], *scores, closed, uses])
    return header, rows


def cells_of(tidy: pd.DataFrame) -> dict[tuple[str, str, str], tuple[float, float]]:
    """Index a matrix: (source, target, method) to (mean, std)."""
    names = zip(*(tidy[name].tolist() for name in CELL), strict=True)
    return dict(zip(names, zip(tidy["mean"].tolist(), tidy["std"].tolist(), strict=True), strict=True))


def cell_text(mean: float, std: float) -> str:
    """Write a cell in percent, such as `24.5 ± 0.6`; one seed has no spread: `24.5 ± –`."""
    if np.isnan(mean):
        return "–"
    return f"{100 * mean:.1f} ± {'–' if np.isnan(std) else f'{100 * std:.1f}'}"


def seeds_text(tidy: pd.DataFrame) -> str:
    """Say over how many seeds a table goes."""
    low, high = int(tidy["n_seeds"].min()), int(tidy["n_seeds"].max())
    return f"{low} seed{'s' if high > 1 else ''}" if low == high else f"{low} to {high} seeds"


def title_of(tidy: pd.DataFrame) -> str:
    """Title of a matrix: metric, granularity, seeds."""
    metric, split, granularity = (tidy[name].iloc[0] for name in ("metric", "split", "granularity"))
    return f"{TITLES[metric]} (%){OF_SPLIT[split]}, adapted per {granularity}, mean ± std over {seeds_text(tidy)}"


def matrices(tidy: pd.DataFrame, metric: str) -> list[pd.DataFrame]:
    """Take the matrices of one score out of a job's table: one per split and granularity."""
    of_metric = tidy[tidy["metric"] == metric]
    return [part.reset_index(drop=True) for _, part in of_metric.groupby(["split", "granularity"], sort=False)]


def render_matrix(tidy: pd.DataFrame) -> Table:
    """Lay a matrix out for the terminal: a row per source and target, a column per method.

    Parameters
    ----------
    tidy
        From `matrix_table`, with at least one row.

    Returns
    -------
    rich.table.Table
        Percent; the last row is the mean over the pairs of different sources that every method was scored on, ± the
        standard deviation of that mean over the seeds that have all of them.
    """
    header, rows, means = grid(tidy)
    table = _laid_out(title_of(tidy), header, rows)
    table.add_section()
    for row in means:
        table.add_row(*row)
    return table


def render_ranking(ranked: pd.DataFrame) -> Table:
    """Lay one table of `ranking` out for the terminal."""
    first = ranked.iloc[0]
    title = f"methods by accuracy (%), mean of {first['pairs']} source ≠ target{OF_SPLIT[first['split']]}"
    return _laid_out(f"{title}, adapted per {first['granularity']}", *ranking_rows(ranked))


def _laid_out(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Lay out text, numbers to the right of the first column."""
    table = Table(title=title, min_width=len(title))
    for name in header:
        table.add_column(name, justify="left" if name in (header[0], USES) else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def markdown_matrix(tidy: pd.DataFrame) -> str:
    """Write the table of `render_matrix` in Markdown."""
    header, rows, means = grid(tidy)
    return f"**{title_of(tidy)}**\n\n{markdown_table(header, [*rows, *means])}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write cells as a table in Markdown, numbers to the right of the first column."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def grid(tidy: pd.DataFrame) -> tuple[list[str], list[list[str]], list[list[str]]]:
    """Header, cells and (with several pairs) the row of means of a matrix, as text."""
    methods = shown(tidy["method"].tolist())
    cells = {cell: cell_text(*values) for cell, values in cells_of(tidy).items()}
    pairs = list(dict.fromkeys(zip(tidy["source"], tidy["target"], strict=True)))
    rows = [[f"{s} → {t}", *[cells.get((s, t, method), "–") for method in methods]] for s, t in pairs]
    n_pairs, mean = _over_pairs(tidy)
    means = [[f"mean of {n_pairs} source ≠ target", *[cell_text(*mean[method]) for method in methods]]] if n_pairs > 1 else []
    return ["source → target", *methods], rows, means


def rows_that_count(transfers: pd.DataFrame, granularity: Granularity) -> pd.DataFrame:
    """Choose the rows of one split that a matrix is made of; see `matrix_table`."""
    within = transfers["source"] == transfers["target"]
    unadapted = ~transfers["method"].isin(PER_UNIT)
    whole = (transfers["granularity"] == "source") & (transfers["scope"] == "whole")
    diagonal = within & (transfers["granularity"] == "plate") & (transfers["scope"] == "adapted")
    if granularity == "source":
        return transfers[diagonal | (~within & whole)]
    of_unit = ~within & (transfers["granularity"] == granularity) & (transfers["scope"] == "adapted")
    # By seed, because each may have drawn a unit of its own; the unadapted model is scored on every unit that was asked for.
    wanted = transfers[of_unit].groupby(["source", "target", "seed"])["unit"].nunique()
    per_unit = transfers[of_unit & ~unadapted]
    have = per_unit.groupby([*CELL, "seed"])["unit"].transform("nunique")
    asked = wanted.reindex(pd.MultiIndex.from_frame(per_unit[["source", "target", "seed"]]))
    complete: pd.DataFrame = per_unit[have.to_numpy() == asked.to_numpy()]
    return pd.concat([transfers[diagonal | (~within & whole & unadapted)], complete])


def _refuse_doubles(rows: pd.DataFrame) -> None:
    """Stop when several configurations are mixed."""
    double = rows[rows.duplicated([*CELL, "unit", "seed"], keep=False)]
    if len(double):
        one = double.iloc[0]
        raise ValueError(
            f"{one['source']} → {one['target']}, {one['method']}, {one['unit']}, seed {one['seed']} has several "
            f"results (keys {', '.join(double['key'].iloc[:2])}): configurations are mixed; pass those of one job"
        )


def _natural(name: str) -> tuple[Any, ...]:
    """Sort key that orders source_3 before source_10."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name))


def _method_rank(name: str) -> int:
    """Position of a method in tables; what is no method comes last."""
    return NAMES.index(name) if name in NAMES else len(NAMES)
