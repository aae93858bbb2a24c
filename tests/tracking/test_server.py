"""The same over HTTP, to the server that people run."""

import os
import signal
import socket
import subprocess
import sys

import pytest
import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from coda_ray.config import Tracking
from coda_ray.tracking.records import read_history, read_record, read_records
from coda_ray.tracking.runs import Tracker
from coda_ray.tracking.store import RunStore
from coda_ray.tracking.sync import sync


@pytest.fixture
def server(tmp_path):
    """A real `mlflow server` on loopback."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--artifacts-destination", str(tmp_path / "files")]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    address = f"http://127.0.0.1:{port}"
    with open(tmp_path / "server.log", "wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=tmp_path, start_new_session=True)
    try:
        with requests.Session() as session:
            session.mount("http://", HTTPAdapter(max_retries=Retry(total=60, backoff_factor=0.5, backoff_max=5)))
            assert session.get(f"{address}/health", timeout=30).text == "OK"
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


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
