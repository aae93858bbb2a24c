import numpy as np
import pandas as pd
import pytest

from coda_ray.tracking.published import published_cells
from coda_ray.tracking.records import transfers_frame
from coda_ray.tracking.table import matrix_table

SOURCES = [f"source_{n}" for n in (3, 5, 8, 11)]
TARGETS = [*SOURCES, "source_7", "source_10"]


def papers(method, **changes):
    frame = pd.DataFrame([{"source": s, "target": t, "method": method} for s in SOURCES for t in TARGETS if s != t])
    return frame.assign(**{"metric": "accuracy", "split": "plate", "granularity": "source", **changes})


@pytest.mark.parametrize(("method", "mean"), [("supervised", 11.1), ("oda", 18.7), ("coda", 24.5)])
def test_the_means_over_pairs_are_those_that_the_paper_prints(method, mean):
    cells = published_cells(papers(method))
    assert len(cells) == 20
    assert 100 * np.mean([cell[0] for cell in cells.values()]) == pytest.approx(mean, abs=0.051)


def test_only_what_was_published_stands_beside_ours(make_transfer):
    assert published_cells(papers("coda"))["source_3", "source_10", "coda"] == pytest.approx((0.267, 0.001))
    for changes in ({"metric": "macro_f1"}, {"split": "compounds"}, {"granularity": "batch"}):
        assert not published_cells(papers("coda", **changes))
    ours = matrix_table(transfers_frame([make_transfer("A", "B", "coda", 0)]), "accuracy", "source")
    assert not published_cells(ours)
