"""What is said of a cluster before stages are handed to it."""

import pytest

from coda_ray.config import ConfigError, Train
from coda_ray.pipeline import task

CPUS, GPUS = {"CPU": 8.0}, {"CPU": 4.0, "GPU": 1.0}


@pytest.fixture
def said(monkeypatch):
    """Look at a cluster of a CPU node and a GPU node; give what is said."""
    monkeypatch.setattr(task, "nodes", lambda: [{"Resources": CPUS}, {"Resources": GPUS}])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def look(**train):
        lines = []
        task.check_resources(Train(**train), lines.append)
        return lines

    return look


def test_nothing_is_said_of_workers_that_fit(said):
    assert said(cpus_per_worker=8, gpus_per_worker=1) == []


def test_gpus_that_nobody_reserves_are_told(said):
    (line,) = said(cpus_per_worker=1)
    assert "--train.gpus-per-worker 1" in line


def test_a_worker_without_a_node_stops_what_was_started_for_this_job_alone(said):
    with pytest.raises(ConfigError, match=r"train\.gpus_per_worker = 2: no node.*at most 1 GPU.*lower --train\.gpus-per-worker"):
        said(gpus_per_worker=2)


def test_a_worker_without_a_node_waits_on_a_cluster_that_may_grow(said, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    (line,) = said(cpus_per_worker=16, gpus_per_worker=1)
    assert "train.cpus_per_worker = 16" in line
    assert "waiting" in line


def test_stages_share_devices_by_fractions(monkeypatch):
    monkeypatch.setattr(task.ray, "cluster_resources", lambda: {"CPU": 12.0, "GPU": 1.0})
    assert task.room(Train(cpus_per_worker=1)) == 12
    assert task.room(Train(cpus_per_worker=0.75)) == 16
    assert task.room(Train(cpus_per_worker=1, gpus_per_worker=0.25)) == 4
    assert task.room(Train(cpus_per_worker=6, gpus_per_worker=0.25)) == 2
    assert task.room(Train(cpus_per_worker=2, workers="3")) == 2
    assert task.room(Train(gpus_per_worker=2)) == 1
