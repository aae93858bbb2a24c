"""An invented results folder: one matrix job from one source to three, with curves."""

import pytest

from invented import invented_results, transfer_record


@pytest.fixture
def make_transfer():
    return transfer_record


@pytest.fixture
def results(tmp_path):
    """One source, three targets, two methods, two seeds: 10 transfers, and a job that names them all."""
    return invented_results(tmp_path / "results")


@pytest.fixture(autouse=True)
def no_address_from_outside(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(autouse=True)
def no_metrics_by_chance(monkeypatch):
    """Points of the system's load come later than a test ends, unless it wants them."""
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "3600")
