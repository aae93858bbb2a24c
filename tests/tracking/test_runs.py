"""MLflow as people will find it, in a database, behind a server that is dead, and behind one that never answers."""

import json
import logging
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from coda_ray.config import Config, Tracking
from coda_ray.storage import Folder
from coda_ray.tiles.store import content_key
from coda_ray.tracking.figures import matrix_figures
from coda_ray.tracking.live import LiveLogger
from coda_ray.tracking.records import IDENTITY, MEASURES, read_history, read_record, read_records, watched_path
from coda_ray.tracking.runs import Tracker
from coda_ray.tracking.store import ENVIRONMENT, RunStore, open_client
from coda_ray.tracking.sync import sync
from coda_ray.tracking.table import compile_transfers, job_matrix
from invented import COMMIT, data_of, transfer_record, write_json
from jobs import sync_mlflow

WAIT_S = 120.0  # only reached when something is broken


def runs_by_kind(store):
    """Every live run of the experiment, by kind."""
    client = store.client
    experiment = client.get_experiment_by_name(store.experiment)
    found = {"job": [], "transfer": [], "stage": [], "trial": [], "plate": []}
    for run in client.search_runs([experiment.experiment_id]):
        found[run.data.tags["kind"]].append(run)
    return found


def n_points(store):
    """Points of all curves and scores, run by run."""
    runs = [run for runs in runs_by_kind(store).values() for run in runs]
    return {
        (run.info.run_id, name): len(store.client.get_metric_history(run.info.run_id, name))
        for run in runs
        for name in run.data.metrics
    }


def do_job(tracker, results):
    """Send what a job of the pipeline sends."""
    job = read_record(results, "jobs/jobkey1.json")
    tracker.start_job(job)
    tracker.stage("dino-cb A", "aaaa", read_history(results, "pretrain/aaaa"))
    for record in read_records(results, "transfers"):
        tracker.transfer(record, read_history(results, record["history"]))
    matrix = job_matrix(compile_transfers(results), job)
    tracker.finish_job(job, matrix, matrix_figures(matrix))


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory):
    """Tables of MLflow; making them takes seconds."""
    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    open_client(f"sqlite:///{path}")
    return path


@pytest.fixture
def store(results, empty_database):
    """The store of the results folder; its tables are made already."""
    shutil.copy(empty_database, results.path("mlflow.db"))
    return RunStore.open(Tracking(), results)


@pytest.fixture
def short_timeouts(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.fixture
def silent_server():
    """A server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def dead_server():
    """An address where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return f"http://127.0.0.1:{port}"


def test_a_job_is_a_run_with_a_run_for_every_transfer_and_stage(results, store):
    tracker = Tracker.open(Tracking(), results)
    do_job(tracker, results)
    assert tracker.close(WAIT_S) == 0
    found = runs_by_kind(store)
    (job,), (stage,) = found["job"], found["stage"]
    assert job.data.tags["key"] == "jobkey1"
    assert job.info.status == "FINISHED"
    note = job.data.tags["mlflow.note.content"]
    assert "jobs/matrix.py --config configs/demo.yaml" in note
    assert "| A → B | 20.5 ± 0.7 | 50.5 ± 0.7 |" in note
    assert len(found["transfer"]) == 10
    records = {record["key"]: record for record in read_records(results, "transfers")}
    for run in found["transfer"]:
        record = records.pop(run.data.tags["key"])
        assert run.data.params == {name: str(record[name]) for name in IDENTITY}
        measured = {name: record[name] for name in MEASURES if record[name] is not None}
        assert {name: run.data.metrics.get(name) for name in measured} == measured
        assert run.data.metrics.keys().isdisjoint(set(MEASURES) - set(measured))
        assert run.data.tags["mlflow.parentRunId"] == job.info.run_id
        assert run.info.status == "FINISHED"
        check_curve(store, run, read_history(results, record["history"]))
    assert not records
    check_curve(store, stage, read_history(results, "pretrain/aaaa"))
    assert stage.data.tags["mlflow.parentRunId"] == job.info.run_id
    assert stage.info.run_name == "dino-cb A"
    files = {file.path for file in store.client.list_artifacts(job.info.run_id)}
    assert files == {"config.yaml", "matrix.json", "matrix.md", "matrix-accuracy-source.png", "matrix-macro_f1-source.png"}
    assert os.listdir(results.path("mlflow_artifacts"))


def described(store):
    """What runs say of themselves, whoever sent them."""
    runs = [run for found in runs_by_kind(store).values() for run in found]
    return {
        (run.data.tags["kind"], run.data.tags["key"]): (
            run.info.run_name,
            run.data.params,
            {name: value for name, value in run.data.tags.items() if name != "mlflow.parentRunId"},
            sorted(
                (have.dataset.name, have.dataset.digest, have.dataset.source, have.tags[0].value)
                for have in run.inputs.dataset_inputs
            ),
        )
        for run in runs
    }


def test_a_job_says_what_it_is_made_of_and_sync_says_the_same(results, store, tmp_path, empty_database):
    tracker = Tracker.open(Tracking(), results)
    do_job(tracker, results)
    assert tracker.close(WAIT_S) == 0
    (job,) = runs_by_kind(store)["job"]
    assert job.data.tags["mlflow.source.git.commit"] == COMMIT
    assert job.data.tags["mlflow.source.git.dirty"] == "false"
    assert job.data.tags["mlflow.source.name"] == "jobs/matrix.py"
    assert job.data.params == {"adapt.lr": "0.0003"}
    assert job.data.metrics["mean_accuracy/coda"] == pytest.approx(0.505)
    told = described(store)
    name, _, tags, data = told["transfer", "ABcoda0"]
    assert name == "coda A → B, seed 0"
    assert "--source A --target B --method coda --granularity source --split plate --seed 0" in tags["mlflow.note.content"]
    address = '{"uri": "s3://tiles/0123456789abcdef/%s"}'
    assert data == [(n, content_key(n), address % n, role) for n, role in (("A", "source"), ("B", "target"))]
    assert [(n, role) for n, *_, role in told["job", "jobkey1"][3]] == [("A", "source, target"), ("B", "target"), ("C", "target")]
    shutil.copy(empty_database, tmp_path / "other.db")
    other = RunStore(f"sqlite:///{tmp_path}/other.db", "coda_ray", (tmp_path / "files").as_uri())
    sync(results, other)
    assert described(other) == told
    sync(results, other)
    assert described(other) == told


def test_a_transfer_from_a_pool_names_the_tiles_of_each_lab(results, store):
    record = transfer_record("A+B", "C", "coda", 0, key="pooled", history=None)
    write_json(results, "transfers/pooled.json", record)
    labs = data_of(("A", "source"), ("B", "source"), ("C", "target"), ("D", "target"))
    write_json(results, "jobs/jobkey1.json", read_record(results, "jobs/jobkey1.json") | {"transfers": ["pooled"], "data": labs})
    sync(results, store)
    name, params, _, data = described(store)["transfer", "pooled"]
    assert (name, params["source"]) == ("coda A+B → C, seed 0", "A+B")
    assert [(lab, role) for lab, *_, role in data] == [("A", "source"), ("B", "source"), ("C", "target")]


def test_a_record_of_an_earlier_release_is_sent_without_what_it_lacks(results, store):
    job = read_record(results, "jobs/jobkey1.json")
    old = {name: value for name, value in job.items() if name not in ("commit", "dirty", "data")}
    results.write("jobs/jobkey1.json", json.dumps(old).encode())
    sync(results, store)
    (run,) = runs_by_kind(store)["job"]
    assert "mlflow.source.git.commit" not in run.data.tags
    assert not run.inputs.dataset_inputs


def test_the_drivers_machine_is_watched_unless_told_otherwise(results, store, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.01")
    job = read_record(results, "jobs/jobkey1.json")
    for watched in (False, True):
        tracker = Tracker.open(Tracking(system_metrics=watched), results)
        tracker.start_job(job)
        assert tracker.live(transfer_record("A", "B", "coda", 0)) is not None  # the job's run is made by now
        run_id = runs_by_kind(store)["job"][0].info.run_id
        until = time.monotonic() + WAIT_S
        while watched and not seen(store, run_id) and time.monotonic() < until:
            pass
        assert tracker.close(WAIT_S) == 0
        assert bool(seen(store, run_id)) is watched
    assert "system/cpu_utilization_percentage" in seen(store, run_id)
    assert not [thread for thread in threading.enumerate() if thread.name == "SystemMetricsMonitor"]


def seen(store, run_id):
    """Measures of the machine that a run has."""
    return [name for name in store.client.get_run(run_id).data.metrics if name.startswith("system/")]


def check_curve(store, run, history):
    """The curve in MLflow is the history, measured points only, at the recorded steps and times."""
    if history is None:
        assert "loss" not in run.data.metrics
        return
    for name in ("loss", "knn"):
        measured = history.dropna(subset=[name])
        points = store.client.get_metric_history(run.info.run_id, name)
        assert [(p.step, p.timestamp, p.value) for p in points] == [
            *zip(measured["step"], measured["time_ms"], measured[name], strict=True)
        ]
    assert run.info.start_time == history["time_ms"].min()
    assert run.info.end_time == history["time_ms"].max()


def test_the_same_job_again_changes_no_run_and_no_point(results, store):
    seen = []
    for _ in range(2):
        tracker = Tracker.open(Tracking(), results)
        do_job(tracker, results)
        assert tracker.close(WAIT_S) == 0
        runs = [run for found in runs_by_kind(store).values() for run in found]
        seen.append(({(run.info.run_id, run.info.status, run.data.tags["key"]) for run in runs}, n_points(store)))
    assert seen[0] == seen[1]


def test_points_that_were_sent_live_are_not_doubled(results, store, make_transfer):
    record = make_transfer("A", "B", "coda", 0)
    history = read_history(results, record["history"])
    tracker = Tracker.open(Tracking(), results)
    tracker.start_job(read_record(results, "jobs/jobkey1.json"))
    identity = {name: record[name] for name in (*IDENTITY, "key")}
    store.end(store.transfer(identity, None, None), "FAILED")  # an earlier attempt
    live = pickle.loads(pickle.dumps(tracker.live(identity)))  # noqa: S301 (as Ray carries it to a worker)
    for point in history.head(25).to_dict("records"):
        live(point.pop("step"), point.pop("time_ms"), point)
    live.close(WAIT_S)
    (run,) = runs_by_kind(store)["transfer"]
    assert run.info.status == "RUNNING"
    assert len(store.client.get_metric_history(run.info.run_id, "loss")) == 25
    tracker.transfer(record, history)
    assert tracker.close(WAIT_S) == 0
    (after,) = runs_by_kind(store)["transfer"]
    assert after.info.run_id == run.info.run_id
    assert after.info.status == "FINISHED"
    assert len(store.client.get_metric_history(run.info.run_id, "loss")) == len(history)
    assert runs_by_kind(store)["job"][0].info.status == "FAILED"  # the job was never finished


def test_a_changed_score_is_shown_even_where_it_fell(results, store, make_transfer):
    for accuracy in (0.5, 0.4):
        store.transfer(make_transfer("A", "B", "coda", 0, accuracy=accuracy), None, None)
    (run,) = runs_by_kind(store)["transfer"]
    assert run.data.metrics["accuracy"] == 0.4


def parent_of(store, kind):
    """Key and name in the description of the job that the one run of a kind is below."""
    (run,) = runs_by_kind(store)[kind]
    above = store.client.get_run(run.data.tags["mlflow.parentRunId"])
    return above.data.tags["key"], run.data.tags.get("mlflow.note.content", "").partition("*")[2].partition("*")[0]


def test_only_a_matrix_takes_what_another_job_has(results, store, make_transfer):
    record = make_transfer("A", "B", "coda", 0)
    jobs = [
        read_record(results, "jobs/jobkey1.json") | {"key": key, "kind": kind, "name": f"job {key}"}
        for key, kind in (("a", "adapt"), ("b", "matrix"), ("c", "adapt"), ("d", "tune"), ("e", "matrix"), ("f", "adapt"))
    ]
    owners = []
    for job in jobs:
        parent = store.job(job)
        store.transfer(record, None, parent, job)
        store.stage("dino-cb A", "aaaa", None, parent, job)
        assert parent_of(store, "stage")[0] == parent_of(store, "transfer")[0]
        owners.append(parent_of(store, "transfer"))
    assert owners == [(key, f"job {key}") for key in "abbbee"]

    # Of a job whose run a person deleted the next one takes over.
    store.client.delete_run(store.job(jobs[4]))
    store.transfer(record, None, store.job(jobs[5]), jobs[5])
    assert parent_of(store, "transfer") == ("f", "job f")


@pytest.mark.parametrize(("kinds", "owner"), [(("adapt", "tune"), 0), (("adapt", "matrix"), 1), (("matrix", "adapt"), 0)])
def test_what_is_sent_later_gets_the_same_place(results, store, kinds, owner):
    job = read_record(results, "jobs/jobkey1.json")
    results.delete("jobs/jobkey1.json")
    for number, kind in enumerate(kinds):
        path = f"jobs/job{number}.json"
        results.write(path, json.dumps(job | {"key": f"job{number}", "kind": kind, "name": f"job {number}"}).encode())
        os.utime(results.path(path), (1e9 + number, 1e9 + number))
    for _ in range(2):
        sync(results, store)
        parents = {run.data.tags["mlflow.parentRunId"] for kind in ("transfer", "stage") for run in runs_by_kind(store)[kind]}
        assert [store.client.get_run(parent).data.tags["key"] for parent in parents] == [f"job{owner}"]


def test_a_run_that_a_lost_answer_doubled_is_taken_away(results, store, make_transfer):
    record = make_transfer("A", "B", "coda", 0)
    kept = store.transfer(record, None, None)
    experiment = store.client.get_experiment_by_name("coda_ray").experiment_id
    store.client.create_run(experiment, tags={"kind": "transfer", "key": record["key"]})
    assert store.transfer(record, None, None) == kept
    assert [run.info.run_id for run in runs_by_kind(store)["transfer"]] == [kept]


def test_sync_twice_gives_the_same_runs_and_points(results, store, capsys, tmp_path):
    counts = sync(results, store)
    assert (counts.jobs, counts.transfers, counts.stages) == (1, 10, 1)
    runs, points = runs_by_kind(store), n_points(store)
    assert {kind: len(found) for kind, found in runs.items()} == {"job": 1, "transfer": 10, "stage": 1, "trial": 0, "plate": 0}
    assert all(run.info.status == "FINISHED" for found in runs.values() for run in found)
    steps = []
    assert sync(results, store, lambda done, total: steps.append((done, total))) == counts
    assert steps == [(n, 12) for n in range(1, 13)]
    assert n_points(store) == points
    assert {run.info.run_id for run in runs_by_kind(store)["job"]} == {run.info.run_id for run in runs["job"]}
    assert sync_mlflow.main([f"--results.address={results.root}"]) == 0
    assert "1 jobs, 10 transfers, 1 stages, 0 trials, 0 courses" in capsys.readouterr().out
    assert n_points(store) == points


def trial_record(**changes):
    """A finished trial of two seeds."""
    cells = [
        {"source": "A", "target": "B", "seed": seed, "replicate_map": 0.2 + seed / 10, "kbet": None, "oracle_accuracy": 0.5}
        for seed in (0, 1)
    ]
    curve = [{"step": step, "score": step / 80, "time_ms": 1_700_000_000_000 + step} for step in (10, 20)]
    record = {
        "key": "t1", "sweep": "sweep1", "point": {"granularity": "batch", "adapt.lr": 0.001}, "status": "finished", "step": 20,
        "score": 0.25, "score_std": 0.07, "cells": cells, "curve": curve, "seconds": 3.0,
    }  # fmt: skip
    return record | changes


def test_trials_are_runs_with_values_as_params_below_their_sweep(results, store):
    job = {"key": "sweep1", "kind": "tune", "name": "sweep of adapt.lr", "command": "python jobs/tune.py"}
    job["config"] = Config.model_validate({"tune": {"pairs": [["A", "B"]]}}).model_dump(mode="json")
    job |= {"transfers": [], "stages": [], "whole": False}
    results.write("jobs/sweep1.json", json.dumps(job).encode())
    for record in (trial_record(), trial_record(key="t2", status="failed", score=None, cells=[], curve=[], reason="it fell")):
        results.write(f"sweeps/sweep1/{record['key']}.json", json.dumps(record).encode())
    assert sync(results, store).trials == sync(results, store).trials == 2
    runs = runs_by_kind(store)
    sweep = next(run for run in runs["job"] if run.data.tags["key"] == "sweep1")
    assert sweep.info.status == "RUNNING"
    first, second = sorted(runs["trial"], key=lambda run: run.data.tags["key"])
    assert {run.data.tags["mlflow.parentRunId"] for run in (first, second)} == {sweep.info.run_id}
    assert first.data.params == {"granularity": "batch", "adapt.lr": "0.001"}
    assert first.data.metrics == pytest.approx({"score": 0.25, "score_std": 0.07, "replicate_map": 0.25, "oracle_accuracy": 0.5})
    assert [point.step for point in store.client.get_metric_history(first.info.run_id, "score")] == [10, 20]
    assert (first.info.status, second.info.status) == ("FINISHED", "FAILED")
    assert second.data.tags["reason"] == "it fell"
    results.write("jobs/sweep1.json", json.dumps(job | {"whole": True}).encode())
    sync(results, store)
    assert store.client.get_run(sweep.info.run_id).info.status == "FINISHED"


def test_a_score_that_reads_labels_is_named_so(store):
    store.trial(trial_record(objective="oracle_accuracy"), None)
    (run,) = runs_by_kind(store)["trial"]
    assert run.data.metrics == pytest.approx(
        {"oracle_score": 0.25, "oracle_score_std": 0.07, "replicate_map": 0.25, "oracle_accuracy": 0.5}
    )


def test_a_trial_that_failed_and_then_finished_has_no_reason_left(store):
    store.trial(trial_record(status="failed", score=None, reason="it fell"), None)
    (failed,) = runs_by_kind(store)["trial"]
    assert (failed.data.tags["reason"], failed.info.status) == ("it fell", "FAILED")
    assert [point.step for point in store.client.get_metric_history(failed.info.run_id, "score")] == [10, 20]
    store.trial(trial_record(), None)
    (run,) = runs_by_kind(store)["trial"]
    assert "reason" not in run.data.tags
    assert (run.data.tags["status"], run.info.status) == ("finished", "FINISHED")


def plate_record(number, **changes):
    """What a watcher keeps of a plate."""
    record = {
        "key": f"watch1 B/b0/p{number}", "job": "watch1", "number": number, "source": "B", "batch": "b0", "plate": f"p{number}",
        "tiles": 72, "quarantined": 1, "wells": 36, "controls": 12, "drift_source": 1.5, "drift_nearest": 0.5 * number,
        "threshold": 1.0, "nearest": "A", "model": "B plate p1", "why": "nearest", "target": "B", "granularity": "plate",
        "unit": "p1", "stage": "adapt/aaaa", "images": 71, "unreadable": 0, "confidence": 0.6, "replicate_agreement": None,
        "distances": {"A": 1.5, "B plate p/1": 0.5 * number}, "adaptation_seconds": 12.5, "tries": 1, "folder": "gone",
    }  # fmt: skip
    return record | changes


def test_plates_of_a_watcher_are_runs_and_points_of_its_curves_once(results, store, tmp_path):
    job = {"key": "watch1", "kind": "watch", "name": "watch, coda from A", "command": "python jobs/watch.py", "whole": False}
    job |= {"config": Config().model_dump(mode="json"), "transfers": [], "stages": []}
    table = pd.DataFrame([plate_record(1), plate_record(2, drift_source=None, confidence=None)])
    for rows in (1, 2, 2):
        tracker = Tracker(store)
        tracker.start_job(job)
        tracker.plate(plate_record(rows), b"PNG")
        tracker.watched(table.head(rows), {"plates.csv": b"1"})
        tracker.finish_job(job)
        assert tracker.close(WAIT_S) == 0
    (run,) = runs_by_kind(store)["job"]
    assert run.info.status == "FINISHED"
    assert [file.path for file in store.client.list_artifacts(run.info.run_id)] == ["config.yaml", "plates.csv"]
    history = {name: store.client.get_metric_history(run.info.run_id, name) for name in ("drift_source", "drift_nearest")}
    assert [(point.step, point.value) for point in history["drift_source"]] == [(1, 1.5)]
    assert [(point.step, point.value) for point in history["drift_nearest"]] == [(1, 0.5), (2, 1.0)]
    first, second = sorted(runs_by_kind(store)["plate"], key=lambda plate: plate.data.tags["key"])
    assert {plate.data.tags["mlflow.parentRunId"] for plate in (first, second)} == {run.info.run_id}
    assert first.info.run_name == "B/b0/p1"
    assert first.data.params["model"] == "B plate p1"
    assert first.data.metrics["drift_nearest"] == 0.5
    assert [(run.data.metrics["distance/A"], run.data.metrics["distance/B plate p_1"]) for run in (first, second)] == [
        (1.5, 0.5),
        (1.5, 1.0),
    ]
    assert "1.50 from the source, 0.50 from A (threshold 1.00)" in first.data.tags["mlflow.note.content"]
    assert [file.path for file in store.client.list_artifacts(first.info.run_id)] == ["plate.png"]

    folder = tmp_path / "predictions"
    folder.mkdir()
    (folder / "plate.png").write_bytes(b"PNG")
    for record in (plate_record(1), plate_record(2), plate_record(3, folder=str(folder))):
        path = watched_path("watch1", [record[name] for name in ("source", "batch", "plate")])
        results.write(path, json.dumps(record).encode())
    results.write("jobs/watch1.json", json.dumps(job).encode())
    results.write("watch/plates.csv", pd.concat([table, pd.DataFrame([plate_record(3)])]).to_csv(index=False).encode())
    results.write("watch/drift.png", b"PNG")
    assert sync(results, store).plates == sync(results, store).plates == 3
    third = next(plate for plate in runs_by_kind(store)["plate"] if plate.data.tags["key"].endswith("p3"))
    assert [file.path for file in store.client.list_artifacts(third.info.run_id)] == ["plate.png"]
    assert [plate.info.status for plate in runs_by_kind(store)["plate"]] == ["FINISHED"] * 3
    curve = store.client.get_metric_history(run.info.run_id, "drift_nearest")
    assert [(point.step, point.value) for point in curve] == [(1, 0.5), (2, 1.0), (3, 1.5)]
    assert [file.path for file in store.client.list_artifacts(run.info.run_id)] == ["config.yaml", "drift.png", "plates.csv"]


def test_a_job_that_is_not_done_stays_open(results, store):
    results.delete("transfers/ABcoda0.json")
    sync(results, store)
    (job,) = runs_by_kind(store)["job"]
    assert job.info.status == "RUNNING"
    assert [file.path for file in store.client.list_artifacts(job.info.run_id)] == ["config.yaml"]


def test_a_dead_server_costs_nothing_and_sync_completes_later(
    results, store, dead_server, short_timeouts, monkeypatch, caplog, capsys
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", dead_server)
    tracker = Tracker.open(Tracking(), results)
    do_job(tracker, results)
    assert tracker.close(WAIT_S) == 13  # job, stage, 10 transfers, end of the job
    warnings = [r.getMessage() for r in caplog.records if r.name.startswith("coda_ray")]
    assert len(warnings) == 3  # the first failure, that it gives up, what is missing
    assert "13 records were not sent" in warnings[-1]
    assert "jobs/sync_mlflow.py" in warnings[-1]
    assert tracker.live(read_records(results, "transfers")[0]) is None
    assert sync_mlflow.main([f"--results.address={results.root}"]) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert dead_server in message
    assert "start the server" in message
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    sync(results, store)
    assert {kind: len(found) for kind, found in runs_by_kind(store).items()} == {
        "job": 1,
        "transfer": 10,
        "stage": 1,
        "trial": 0,
        "plate": 0,
    }


def test_a_server_that_never_answers_makes_nobody_wait(results, silent_server, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", silent_server)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3600")  # whoever waited would not come back
    open_client(silent_server)  # MLflow is imported: the thread below gets as far as the server
    tracker = Tracker.open(Tracking(), results)
    do_job(tracker, results)
    assert tracker.close(0.2) == 13


def test_live_curves_give_up_on_a_silent_server(results, silent_server, short_timeouts, monkeypatch, make_transfer):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", silent_server)
    monkeypatch.setattr("coda_ray.tracking.runs.SERVER_WAIT_S", (0.2, 30.0))
    tracker = Tracker.open(Tracking(), results)
    assert tracker.live(make_transfer("A", "B", "coda", 0)) is None
    assert tracker.live_stage("dino-cb A", "aaaa") is None
    tracker.close(0.0)
    live = LiveLogger(silent_server, "0" * 32)
    for step in range(50):
        live(step, 1_700_000_000_000 + step, {"loss": 1.0, "knn": float("nan")})
    live.close(0.1)
    live(51, 1_700_000_000_051, {"loss": 1.0})  # after the end: dropped


def test_nothing_is_sent_without_an_address(results, caplog, monkeypatch, make_transfer):
    remote = Folder(fs=SimpleNamespace(), root="bucket/results")
    with caplog.at_level(logging.INFO, logger="coda_ray"):
        for tracker in (Tracker.open(Tracking(), remote), Tracker.open(Tracking(enabled=False), results)):
            tracker.start_job({"name": "n", "key": "k"})
            tracker.transfer(make_transfer("A", "B", "coda", 0))
            assert tracker.live(make_transfer("A", "B", "coda", 0)) is None
            assert tracker.close() == 0
            assert tracker.ui_hint is None
    assert "MLFLOW_TRACKING_URI is not set" in caplog.text
    assert "tracking.enabled = false" in caplog.text
    assert not results.exists("mlflow.db")


def test_an_experiment_that_was_deleted_is_named(results, store, make_transfer):
    store.transfer(make_transfer("A", "B", "coda", 0), None, None)
    store.client.delete_experiment(store.client.get_experiment_by_name("coda_ray").experiment_id)
    fresh = RunStore.open(Tracking(), results)
    with pytest.raises(ValueError, match=r"'coda_ray' is deleted.*tracking\.experiment"):
        fresh.client  # noqa: B018 (opening it is the call)


def test_keys_of_the_environment_and_passwords_never_reach_the_store(results, store, monkeypatch, caplog, short_timeouts):
    secret = "x9-" + "wJalrXUtnFEMIK7MDENG"
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "MLFLOW_TRACKING_TOKEN"):
        monkeypatch.setenv(name, secret)
    tracker = Tracker.open(Tracking(), results)
    do_job(tracker, results)
    assert tracker.close(WAIT_S) == 0
    files = [os.path.join(root, name) for root, _, names in os.walk(results.root) for name in names]
    assert any(path.endswith("mlflow.db") for path in files)
    for path in files:
        with open(path, "rb") as file:
            assert secret.encode() not in file.read(), path
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:{secret}@127.0.0.1:9/")
    tracker = Tracker.open(Tracking(), results)
    assert tracker.ui_hint == "http://127.0.0.1:9/"
    tracker.start_job(read_record(results, "jobs/jobkey1.json"))
    tracker.close(WAIT_S)
    assert secret not in caplog.text


def test_a_long_history_is_sent_in_allowed_portions(results, store, make_transfer):
    n = 2_350
    history = pd.DataFrame({"step": np.arange(n), "time_ms": 1_700_000_000_000 + np.arange(n), "loss": 1.0, "lr": 0.1})
    run_id = store.transfer(make_transfer("A", "B", "coda", 0), history, None)
    assert len(store.client.get_metric_history(run_id, "lr")) == n


def test_help_does_not_import_mlflow():
    code = (
        "import sys, jobs.sync_mlflow, coda_ray.tracking.runs, coda_ray.tracking.live, coda_ray.tracking.sync;"
        "sys.exit('mlflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[2]).returncode == 0


def test_a_new_database_is_made_and_threads_end_with_the_tracker(results):
    before = {thread for thread in threading.enumerate() if thread.name.startswith("outbox")}
    tracker = Tracker.open(Tracking(), results)
    tracker.start_job(read_record(results, "jobs/jobkey1.json"))
    assert tracker.close(WAIT_S) == 0
    assert {thread for thread in threading.enumerate() if thread.name.startswith("outbox")} <= before
    assert [run.info.status for run in runs_by_kind(RunStore.open(Tracking(), results))["job"]] == ["FAILED"]


def test_what_the_user_set_is_kept(monkeypatch, tmp_path):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    open_client(f"sqlite:///{tmp_path}/mlflow.db")
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == ENVIRONMENT["MLFLOW_HTTP_REQUEST_MAX_RETRIES"]


def test_a_report_is_on_the_jobs_run_now_and_by_sync(results, store):
    (job,) = read_records(results, "jobs")
    sync(results, store)
    (run,) = runs_by_kind(store)["job"]
    tracker = Tracker(store)
    tracker.report(job, {"report.html": b"<html>", "a.csv": b"1"})
    assert tracker.close(WAIT_S) == 0
    assert [file.path for file in store.client.list_artifacts(run.info.run_id, "report")] == [
        "report/a.csv",
        "report/report.html",
    ]
    results.write(f"report/{job['key']}/later.csv", b"2")
    sync(results, store)
    (run,) = runs_by_kind(store)["job"]
    assert run.info.status == "FINISHED"
    assert "report/later.csv" in [file.path for file in store.client.list_artifacts(run.info.run_id, "report")]
