"""How well each label-free criterion chooses among the adaptations of a sweep, told by an oracle.

python benchmarks/selection.py results/report/SWEEP/scores.csv

Every state that was scored (trial and step, and the unadapted model) is one that a person could have chosen. Per transfer the
criterion's rank correlation with the oracle, and how far the state that it likes best is from the best; then mean ± std over
transfers. This reads the target's labels: it judges criteria in simulation, and chooses nothing.
"""

import argparse
import sys

import numpy as np
import pandas as pd

from coda_ray.analysis.selection import CRITERIA, agreement
from coda_ray.tracking.table import markdown_table

ORACLE = "oracle_accuracy"
STATE = ["trial", "method", "step"]


def main(argv: list[str] | None = None) -> int:
    """Print the table, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scores", nargs="+", help="scores.csv of one sweep or more; those of one transfer are taken together")
    parser.add_argument("--oracle", default=ORACLE, help="column that reads labels (default: %(default)s)")
    options = parser.parse_args(argv)
    scores = pd.concat([pd.read_csv(file) for file in options.scores], ignore_index=True)
    if options.oracle not in scores:
        print(f"{', '.join(options.scores)}: no column {options.oracle!r}; its columns are {', '.join(scores)}", file=sys.stderr)
        return 2
    found = judge(scores, options.oracle)
    print(f"{found.attrs['states']} states of each of {found.attrs['transfers']} transfers; {options.oracle} in points\n")
    print(_told(found), end="")
    return 0


def judge(scores: pd.DataFrame, oracle: str) -> pd.DataFrame:
    """Judge every criterion on every transfer.

    Parameters
    ----------
    scores
        One row per state, source, target and seed; seeds are averaged.
    oracle
        Column of what reads labels.

    Returns
    -------
    DataFrame
        One row per way to choose and transfer: rank_correlation (NaN where a way has none), chosen, regret (points).
    """
    rows = []
    pairs = scores.groupby(["source", "target"])
    for (source, target), own in pairs:
        states = own.groupby(STATE, sort=False)[[*CRITERIA, oracle]].mean().reset_index()
        truth = states[oracle].to_numpy() * 100
        unadapted = truth[states["step"] == 0]
        plain = {"unadapted": unadapted.mean(), "any state at random": truth.mean(), "the best (oracle)": truth.max()}
        rows += [(name, source, target, np.nan, value, truth.max() - value) for name, value in plain.items()]
        for name, direction in CRITERIA.items():
            values = states[name].to_numpy(dtype=float)
            if np.isfinite(values).any():
                one = agreement(values, truth, direction)
                rows.append((name, source, target, one.rank_correlation, one.chosen, one.regret))
    frame = pd.DataFrame(rows, columns=["way", "source", "target", "rank_correlation", "chosen", "regret"])
    frame.attrs = {"states": min(own.groupby(STATE).ngroups for _, own in pairs), "transfers": len(pairs)}
    return frame


def _told(found: pd.DataFrame) -> str:
    """Lay out one row per way to choose, the least regret first, in Markdown."""
    rows = []
    for way in found.groupby("way")["regret"].mean().sort_values().index:
        own = found[found["way"] == way]
        cells = [_spread(own[name], digits) for name, digits in (("rank_correlation", 2), ("chosen", 1), ("regret", 1))]
        rows.append([f"`{way}`" if way in CRITERIA else way, *cells])
    return markdown_table(["choose by", "rank correlation", "accuracy of the chosen", "regret"], rows)


def _spread(values: pd.Series, digits: int) -> str:
    """Mean ± standard deviation; – where there is none."""
    if values.isna().all():
        return "–"
    return f"{values.mean():.{digits}f} ± {values.std():.{digits}f}"


if __name__ == "__main__":
    raise SystemExit(main())
