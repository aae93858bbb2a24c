"""An invented results folder, invented findings on it, stages of an invented job, and a reader of pages."""

import io
import itertools
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd

from coda_ray.config import Config, Place
from coda_ray.storage import Folder, open_place
from coda_ray.tiles.store import content_key
from coda_ray.tracking.findings import (
    DATA_COLUMNS,
    DIFFERENCE_COLUMNS,
    POOLED,
    Example,
    FeatureMap,
    Findings,
    LayerComparison,
)
from coda_ray.tracking.records import FEATURE_SCORES
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


def write_json(results, path, value):
    results.write(path, json.dumps(value).encode())


def write_history(results, stage_path, seed, points=40):
    rng = np.random.default_rng(seed)
    history = pd.DataFrame(
        {
            "step": np.arange(points) * 20,
            "time_ms": 1_700_000_000_000 + np.arange(points) * 1500,
            "loss": rng.uniform(3, 5, points),
            "knn": np.where(np.arange(points) % 10 == 0, rng.uniform(0, 1, points), np.nan),
        }
    )
    sink = io.BytesIO()
    history.to_parquet(sink, index=False)
    results.write(f"{stage_path}/history.parquet", sink.getvalue())
    return history


def transfer_record(source, target, method, seed, **changes):
    home = source == target
    adapted = method in ("oda", "coda")
    key = f"{source}{target}{method}{seed}".replace("-", "")
    score = {"supervised": 0.2, "dual-cb": 0.25, "coda": 0.5}[method] + seed / 100
    record = {
        "source": source,
        "target": target,
        "method": method,
        "granularity": "plate" if home else "source",
        "unit": f"{source}-P3" if home else target,
        "scope": "adapted" if home else "whole",
        "split": "plate",
        "seed": seed,
        "n_images": 100,
        "n_wells": 10,
        "n_compounds": 5,
        "accuracy": score,
        "macro_f1": score / 2,
        "well_accuracy": score,
        "well_macro_f1": score / 2,
        "compound_accuracy": score,
        "compound_macro_f1": score / 2,
        "accuracy_low": score - 0.02,
        "accuracy_high": score + 0.02,
        **dict.fromkeys(FEATURE_SCORES, None if home else 0.3),
        "steps": 780 if adapted else 0,
        "seconds": 12.5,
        "key": key,
        "history": f"adapt/{key}" if adapted else None,
    }
    return record | changes


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def data_of(*roles):
    """Tiles of sources, as a job's record names them."""
    return [
        {
            "name": name,
            "address": f"s3://tiles/0123456789abcdef/{name}",
            "fingerprint": content_key(name),
            "tiles": 360,
            "context": context,
        }
        for name, context in roles
    ]


def invented_results(root: Path) -> Folder:
    """A results folder with one matrix: one source, three targets, two methods, two seeds."""
    results = open_place(Place(address=str(root)))
    records = [
        transfer_record(source, target, method, seed)
        for source, target, method, seed in itertools.product("A", "ABC", ("supervised", "coda"), (0, 1))
        if not (source == target and method == "coda")
    ]
    for number, record in enumerate(records):
        write_json(results, f"transfers/{record['key']}.json", record)
        if record["history"]:
            write_history(results, record["history"], number)
    write_history(results, "pretrain/aaaa", 99)
    write_json(results, "pretrain/aaaa/stage.json", {"stage": "pretrain", "key": "aaaa", "title": "dino-cb A", "inputs": {}})
    job = {
        "key": "jobkey1",
        "kind": "matrix",
        "name": "matrix A → B, C",
        "command": "python jobs/matrix.py --config configs/demo.yaml",
        "commit": COMMIT,
        "dirty": False,
        "config": {"adapt": {"lr": 0.0003}, "results": {"address": "s3://bucket/results"}},
        "data": data_of(("A", "source, target"), ("B", "target"), ("C", "target")),
        "transfers": [record["key"] for record in records],
        "stages": ["pretrain/aaaa"],
    }
    write_json(results, "jobs/jobkey1.json", job)
    return results


def write_sweep(results: Folder) -> list[dict]:
    """Add a finished sweep of granularity and learning rate, six trials, to a results folder."""
    space = {"granularity": ["source", "batch"], "adapt.lr": [1e-4, 5e-4, 1e-3]}
    config = Config.model_validate({"tune": {"pairs": [["A", "B"]], "space": space, "search": "grid"}})
    trials = []
    for number, (granularity, lr) in enumerate(itertools.product(*space.values())):
        score = 0.15 + 20 * lr - (0.01 if granularity == "batch" else 0.0)
        cell = {"source": "A", "target": "B", "seed": 0, "replicate_map": score, "oracle_accuracy": 0.55 - 50 * lr}
        curve = [{"step": 50 * n, "score": score * n / 3, "time_ms": 1_700_000_000_000 + 60_000 * n} for n in (1, 2, 3)]
        point = {"granularity": granularity, "adapt.lr": lr}
        trials.append(
            {
                "key": f"trial{number}", "sweep": "sweepkey1", "point": point, "status": "finished", "step": 150, "score": score,
                "score_std": None, "cells": [cell], "curve": curve, "seconds": 180.0,
            }
        )  # fmt: skip
        write_json(results, f"sweeps/sweepkey1/trial{number}.json", trials[-1])
    job = {
        "key": "sweepkey1",
        "kind": "tune",
        "name": "sweep of granularity, adapt.lr, A → B",
        "command": "python jobs/tune.py --config configs/demo.yaml",
        "config": config.model_dump(mode="json"),
        "data": data_of(("A", "source"), ("B", "target")),
        "transfers": [],
        "stages": [],
        "whole": True,
        "summary": "| granularity | score |\n| --- | ---: |\n| source | 0.17 |\n",
    }
    write_json(results, "jobs/sweepkey1.json", job)
    return trials


def invented_stage(kind: str, title: str, *needs: object, rate: str | None = None, samples: int = 0):
    """A stage that cannot be run."""
    from coda_ray.pipeline.stage import Stage, Workload

    work = Workload(rate, "s", plates=1, tiles=1, steps=1, minibatch=1, samples=samples) if rate else None
    return Stage(kind, title, {"title": title}, make=lambda folder, report: (dict, None), needs=needs, workload=work)


def invented_chain() -> list:
    """Stages, each after the one before: two that learn, the second from half as many samples, one that looks, one that draws."""
    learn = invented_stage("pretrain", "pretrain", rate="dino", samples=800)
    adapt = invented_stage("adapt", "adapt", learn, rate="dino", samples=400)
    look = invented_stage("evaluate", "evaluate", adapt, rate="inference", samples=100)
    return [learn, adapt, look, invented_stage("map", "map", look)]
