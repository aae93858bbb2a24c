"""The figures that the CODA paper printed, to stand beside ours."""

from functools import cache
from importlib.resources import files

import pandas as pd

from coda_ray.tracking.table import CELL

Cells = dict[tuple[str, str, str], tuple[float, float]]


def published_cells(tidy: pd.DataFrame) -> Cells:
    """Find what the paper printed for the cells of a matrix.

    Parameters
    ----------
    tidy
        One metric at one split and granularity, from `table.matrix_table`.

    Returns
    -------
    dict
        (source, target, method) to (mean, std) as shares in [0, 1], std NaN where none was printed; empty for other sources
        than the paper's, other metrics than accuracy per image, other splits than its own, other granularities than `source`.
    """
    asked = tidy[(tidy["split"] == "plate") & (tidy["granularity"] == "source")]
    found = asked[["metric", *CELL]].merge(_published(), on=["metric", *CELL])
    values = zip((found["mean"] / 100).tolist(), (found["std"] / 100).tolist(), strict=True)
    return dict(zip(found[CELL].itertuples(index=False, name=None), values, strict=True))


@cache
def _published() -> pd.DataFrame:
    """Read the file."""
    with (files("coda_ray.tracking") / "published.csv").open(encoding="utf-8") as file:
        return pd.read_csv(file, comment="#")
