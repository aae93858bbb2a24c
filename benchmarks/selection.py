"""How well each label-free criterion chooses among the adaptations of a sweep, told by an oracle.

python benchmarks/selection.py results/report/SWEEP/scores.csv

Every state that was scored (trial and step, and the unadapted model that its method starts from) is one that a person could have
chosen. Per source, target and method the criterion's rank correlation with the oracle, and how far the state that it likes best
is from the best; then mean ± std over them. Methods are judged apart, because losses, ranks and distances from the start of
different networks are no common scale. This reads the target's labels: it judges criteria in simulation, and chooses nothing.
"""

import argparse
import sys

import numpy as np
import pandas as pd

from coda_ray.analysis.selection import CRITERIA, agreement
from coda_ray.tracking.table import markdown_table

ORACLE = "oracle_accuracy"
STATE = ["trial", "step"]
GROUP = ["source", "target", "method"]


def main(argv: list[str] | None = None) -> int:
    """Print the table, as Markdown."""
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
    print(f"\n{options.oracle} in points\n")
    print(_told(found), end="")
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
        if len(states) < 2:
            continue
        counts[group] = len(states)
        truth = states[oracle].to_numpy() * 100
        unadapted = truth[states["step"] == 0]
        plain = {"unadapted": unadapted.mean(), "any state at random": truth.mean(), "the best (oracle)": truth.max()}
        rows += [(name, *group, np.nan, value, truth.max() - value) for name, value in plain.items()]
        for name, direction in CRITERIA.items():
            values = states[name].to_numpy(dtype=float)
            if np.isfinite(values).any():
                one = agreement(values, truth, direction)
                rows.append((name, *group, one.rank_correlation, one.chosen, one.regret))
    if not rows:
        raise ValueError("no method has two states of a transfer; give the scores of a sweep with finished trials")
    frame = pd.DataFrame(rows, columns=["way", *GROUP, "rank_correlation", "chosen", "regret"])
    frame.attrs = {"states": counts}
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
