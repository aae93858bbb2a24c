"""An invented results folder: one matrix job from one source to three, with curves."""

import io
import itertools
import json

import numpy as np
import pandas as pd
import pytest

from coda_ray.config import Place
from coda_ray.storage import open_place
from coda_ray.tracking.records import FEATURE_SCORES


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


@pytest.fixture
def make_transfer():
    return transfer_record


@pytest.fixture
def results(tmp_path):
    """One source, three targets, two methods, two seeds: 10 transfers, and a job that names them all."""
    results = open_place(Place(address=str(tmp_path / "results")))
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
        "config": {"adapt": {"lr": 0.0003}, "results": {"address": "s3://bucket/results"}},
        "transfers": [record["key"] for record in records],
        "stages": ["pretrain/aaaa"],
    }
    write_json(results, "jobs/jobkey1.json", job)
    return results


@pytest.fixture(autouse=True)
def no_address_from_outside(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
