"""What a person sees of a sweep, without a Ray."""

import signal

import pytest

from coda_ray.config import Config
from coda_ray.pipeline import report


@pytest.fixture
def swept(monkeypatch):
    """`jobs/tune.py` with another sweep behind it."""
    before = signal.getsignal(signal.SIGTERM)

    def run(sweep):
        monkeypatch.setattr(report, "start_ray", lambda: None)
        monkeypatch.setattr(report, "run_sweep", sweep)
        return report.run_tune(Config(), "python jobs/tune.py --config own.yaml")

    yield run
    signal.signal(signal.SIGTERM, before)


def test_a_scheduler_ends_a_sweep_as_ctrl_c_does(swept, capsys):
    def stopped(*_):
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("it went on")

    with pytest.raises(SystemExit) as end:
        swept(stopped)
    assert end.value.code == 130
    assert "interrupted" in capsys.readouterr().err
