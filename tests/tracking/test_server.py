"""The same over HTTP, to the server that people run."""

import pytest

from browser import mlflow_server
from coda_ray.config import Tracking
from coda_ray.tracking.records import read_history, read_record, read_records
from coda_ray.tracking.runs import Tracker
from coda_ray.tracking.store import RunStore
from coda_ray.tracking.sync import sync


@pytest.fixture
def server(tmp_path):
    with mlflow_server(tmp_path) as address:
        yield address


@pytest.mark.slow
def test_a_job_and_a_sync_over_http(results, server, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    store = RunStore.open(Tracking(), results)
    tracker = Tracker.open(Tracking(), results)
    job = read_record(results, "jobs/jobkey1.json")
    tracker.start_job(job)
    (record,) = [r for r in read_records(results, "transfers") if r["key"] == "ABcoda0"]
    live = tracker.live(record | dict.fromkeys(("accuracy", "macro_f1", "well_accuracy", "well_macro_f1", "steps", "seconds")))
    for point in read_history(results, record["history"]).to_dict("records"):
        live(point.pop("step"), point.pop("time_ms"), point)
    live.close(60)
    tracker.transfer(record, read_history(results, record["history"]))
    assert tracker.close(60) == 0
    for _ in range(2):
        sync(results, store)
        experiment = store.client.get_experiment_by_name("coda_ray").experiment_id
        runs = store.client.search_runs([experiment])
        assert sorted(run.data.tags["kind"] for run in runs) == ["job", "stage", *["transfer"] * 10]
        (run,) = [run for run in runs if run.data.tags["key"] == "ABcoda0"]
        assert run.info.run_id == live.run_id
        assert len(store.client.get_metric_history(run.info.run_id, "loss")) == 40
        assert len(store.client.get_metric_history(run.info.run_id, "accuracy")) == 1
        (parent,) = [run for run in runs if run.data.tags["kind"] == "job"]
        assert parent.info.status == "FINISHED"
        files = {file.path for file in store.client.list_artifacts(parent.info.run_id)}
        assert {"config.yaml", "matrix.json", "matrix-accuracy-source.png"} <= files
    assert not results.exists("mlflow.db")
