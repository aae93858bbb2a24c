"""Invented findings, and a reader of pages."""

from html.parser import HTMLParser

import numpy as np
import pandas as pd

from coda_ray.tracking.findings import (
    DATA_COLUMNS,
    DIFFERENCE_COLUMNS,
    POOLED,
    Example,
    FeatureMap,
    Findings,
    LayerComparison,
)
from coda_ray.tracking.table import compile_transfers, job_matrix

VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """What is on a page; refuses elements that are not closed in order, and names that are given twice."""

    def __init__(self, text):
        super().__init__()
        self.open, self.names, self.addresses, self.tables, self.text = [], [], [], {}, []
        self._table, self._cell = None, None
        self.feed(text)
        self.close()
        assert not self.open
        assert len(set(self.names)) == len(self.names)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.names += [given["id"]] if "id" in given else []
        self.addresses += [given[name] for name in ("href", "src") if name in given]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self._table = self.tables.setdefault(given["id"], [])
        if tag == "tr":
            self._table.append([])
        if tag in ("td", "th"):
            self._table[-1].append("")
            self._cell = self._table[-1]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            self._cell = None

    def handle_data(self, data):
        self.text.append(data)
        if self._cell is not None:
            self._cell[-1] += data


def findings(results, **changes):
    """Everything that a report can show, on the invented results folder."""
    rng = np.random.default_rng(0)
    transfers = compile_transfers(results)
    states = np.repeat(["before", "after"], 60)
    frame = pd.DataFrame({"state": states, "x": rng.normal(size=120), "y": rng.normal(size=120)})
    frame["batch"], frame["moa"] = (
        "b" + frame.index.map(lambda i: str(i % 3)),
        [f"moa {i % 54}" if i % 5 else None for i in range(120)],
    )
    rows = [["plate", "source", t, "coda", "supervised", 0.3, 0.2, 0.4, 100, 10, 2] for t in ("B", "C", POOLED)]
    given = {
        "job": {"key": "jobkey1", "name": "matrix A → <b>B</b>, C", "command": "python jobs/matrix.py --config 'a & b.yaml'"},
        "data": pd.DataFrame([["A", 2, 4, 28, 7, 3, 1056, 48, "32 × 32", np.nan]], columns=list(DATA_COLUMNS)),
        "transfers": transfers,
        "matrix": job_matrix(transfers, {"transfers": transfers["key"].tolist()}),
        "differences": pd.DataFrame(rows, columns=list(DIFFERENCE_COLUMNS)),
        "examples": [
            Example(
                name, ("c1", "c2"), ("DNA", "ER"), rng.integers(0, 255, (2, 2, 8, 8)).astype(np.uint8),
                rng.normal(size=(2, 2, 8, 8)).astype(np.float32), size,
            )
            for name, size in (("A", 0.6), ("B", np.nan))
        ],
        "maps": [FeatureMap("A", "B", "dual-cb", "coda", 0, frame)],
        "layers": [LayerComparison("own", "layers", "coda", "dual-cb", 0, {"all tokens": np.eye(3), "CLS": np.eye(3) / 2})],
        "unfinished": [],
        "unscored": 0,
        "remedy": "python jobs/matrix.py",
    }  # fmt: skip
    return Findings(**(given | changes))
