"""How well each label-free criterion chooses among the configurations of a sweep, told by an oracle.

python benchmarks/selection.py results/report/SWEEP/scores.csv

Two tables. The first asks per source, target and method: the criterion's rank correlation with the oracle, and how far the state
that it likes best is from the best; mean ± std over them. Methods are judged apart, because losses, ranks and distances from the
start of different networks are no common scale. The second asks what a sweep asks: one state for all transfers, by the mean of
the criterion over them, of each method and of all. A state is a trial at a step, or the unadapted model of a method. This reads
the target's labels: it judges criteria in simulation, and chooses nothing.
"""

import argparse
import sys
from collections.abc import Iterator

import numpy as np
import pandas as pd

from coda_ray.analysis.selection import CRITERIA, agreement
from coda_ray.tracking.table import markdown_table

ORACLE = "oracle_accuracy"
STATE = ["trial", "step"]
PAIR = ["source", "target"]
GROUP = [*PAIR, "method"]
BEST = "the best (oracle)"
# Of the second table, the column over all methods.
ALL = "all"


def main(argv: list[str] | None = None) -> int:
    """Print the tables, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "scores", nargs="+", help="scores.csv of one sweep or more; those of one transfer and method are taken together"
    )
    parser.add_argument("--oracle", default=ORACLE, help="column that reads labels (default: %(default)s)")
    options = parser.parse_args(argv)
    scores = pd.concat([pd.read_csv(file) for file in options.scores], ignore_index=True)
    if options.oracle not in scores:
        print(f"{', '.join(options.scores)}: no column {options.oracle!r}; its columns are {', '.join(scores)}", file=sys.stderr)
        return 2
    found = judge(scores, options.oracle)
    for (source, target, method), states in found.attrs["states"].items():
        print(f"{method} {source} → {target}: {states} states, the unadapted one among them")
    print(f"\n{options.oracle} in points, transfer by transfer\n")
    print(_told(found), end="")
    together = judge_together(scores, options.oracle)
    print(f"\nOne state for all {len(scores[PAIR].drop_duplicates())} transfers, {options.oracle} in points below the best\n")
    print(_told_together(together), end="")
    return 0


def judge(scores: pd.DataFrame, oracle: str) -> pd.DataFrame:
    """Judge every criterion on every source, target and method.

    Parameters
    ----------
    scores
        One row per state, source, target and seed; seeds are averaged.
    oracle
        Column of what reads labels.

    Returns
    -------
    DataFrame
        One row per way to choose, source, target and method: rank_correlation (NaN where a way has none), chosen, regret
        (points). A method of which there is one state alone is left out; `attrs["states"]` has the number of the others.

    Raises
    ------
    ValueError
        When no method has two states.
    """
    rows, counts = [], {}
    for group, own in scores.groupby(GROUP):
        states = own.groupby(STATE, sort=False)[[*CRITERIA, oracle]].mean().reset_index()
        if len(states) > 1:
            counts[group] = len(states)
            rows += [(way, *group, *numbers) for way, *numbers in _judged(states, oracle)]
    if not rows:
        raise ValueError("no method has two states of a transfer; give the scores of a sweep with finished trials")
    frame = pd.DataFrame(rows, columns=["way", *GROUP, "rank_correlation", "chosen", "regret"])
    frame.attrs = {"states": counts}
    return frame


def judge_together(scores: pd.DataFrame, oracle: str) -> pd.DataFrame:
    """Judge every criterion where it chooses one state for all transfers, as a sweep does.

    Parameters
    ----------
    scores
        As for `judge`. A state that a transfer lacks, or a criterion that it lacks there, cannot be chosen.
    oracle
        Column of what reads labels.

    Returns
    -------
    DataFrame
        One row per way to choose and method, and over all methods (`ALL`): rank_correlation, chosen, regret (points).

    Raises
    ------
    ValueError
        When no state was scored on all transfers.
    """
    values = [*CRITERIA, oracle]
    state = ["method", *STATE]
    by_state = scores.groupby([*state, *PAIR], sort=False)[values].mean().groupby(state, sort=False)
    whole = by_state.mean(skipna=False)[by_state.size() == len(scores[PAIR].drop_duplicates())].reset_index()
    if whole.empty:
        raise ValueError("no state was scored on every transfer; finish the sweep, or give one with a single set of pairs")
    rows = [
        (way, name, *numbers)
        for name, states in [*whole.groupby("method"), (ALL, whole)]
        for way, *numbers in _judged(states, oracle)
    ]
    return pd.DataFrame(rows, columns=["way", "method", "rank_correlation", "chosen", "regret"])


def _judged(states: pd.DataFrame, oracle: str) -> Iterator[tuple[str, float, float, float]]:
    """Give rank correlation, accuracy of the chosen and regret of every way to choose among some states."""
    truth = states[oracle].to_numpy() * 100
    plain = {"unadapted": truth[states["step"] == 0].mean(), "any state at random": truth.mean(), BEST: truth.max()}
    for name, value in plain.items():
        yield name, np.nan, value, truth.max() - value
    for name, direction in CRITERIA.items():
        values = states[name].to_numpy(dtype=float)
        if np.isfinite(values).any():
            one = agreement(values, truth, direction)
            yield name, one.rank_correlation, one.chosen, one.regret


def _told(found: pd.DataFrame) -> str:
    """Lay out one row per way to choose, the least regret first, in Markdown."""
    rows = []
    for way in found.groupby("way")["regret"].mean().sort_values().index:
        own = found[found["way"] == way]
        cells = [_spread(own[name], digits) for name, digits in (("rank_correlation", 2), ("chosen", 1), ("regret", 1))]
        rows.append([_name(way), *cells])
    return markdown_table(["choose by", "rank correlation", "accuracy of the chosen", "regret"], rows)


def _told_together(found: pd.DataFrame) -> str:
    """Lay out regrets, one row per way to choose and one column per method, in Markdown."""
    regrets = found.pivot(index="way", columns="method", values="regret")
    best = found[found["way"] == BEST].set_index("method")["chosen"]
    methods = [*(name for name in regrets if name != ALL), ALL]
    rows = [[_name(way), *(f"{row[name]:.1f}" for name in methods)] for way, row in regrets.sort_values(ALL).iterrows()]
    return markdown_table(["choose by", *(f"{name} (best {best[name]:.1f})" for name in methods)], rows)


def _name(way: object) -> str:
    """Show a way to choose; criteria as code."""
    return f"`{way}`" if way in CRITERIA else str(way)


def _spread(values: pd.Series, digits: int) -> str:
    """Mean ± standard deviation; – where there is none."""
    if values.isna().all():
        return "–"
    return f"{values.mean():.{digits}f} ± {values.std():.{digits}f}"


if __name__ == "__main__":
    raise SystemExit(main())
