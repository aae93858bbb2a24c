"""What a person sees of a sweep, without a Ray."""

import signal

import pandas as pd
import pytest

from coda_ray.config import Config
from coda_ray.pipeline import report
from coda_ray.pipeline.sweep import Outcome


@pytest.fixture
def swept(monkeypatch):
    """`jobs/tune.py` with another sweep behind it."""
    # Tune leaves its own handler of Ctrl-C behind in a process that ran a sweep.
    before = {signal.SIGTERM: signal.getsignal(signal.SIGTERM), signal.SIGINT: signal.getsignal(signal.SIGINT)}
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def run(sweep):
        monkeypatch.setattr(report, "start_ray", lambda: None)
        monkeypatch.setattr(report, "run_sweep", sweep)
        return report.run_tune(Config(), "python jobs/tune.py --config own.yaml")

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("before", [signal.default_int_handler, signal.SIG_IGN], ids=["in front", "in the background of a shell"])
def test_a_scheduler_ends_a_sweep_as_ctrl_c_does(swept, capsys, before):
    signal.signal(signal.SIGINT, before)

    def stopped(*_):
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("it went on")

    with pytest.raises(SystemExit) as end:
        swept(stopped)
    assert end.value.code == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("first", ["unadapted", "finished"])
def test_that_nothing_should_be_adapted_is_said_beside_the_best(swept, capsys, first):
    rows = [
        {"status": status, "n_seeds": 1, "step": 4, "score": 0.5}
        for status in sorted(["unadapted", "finished"], key=first.__ne__)
    ]
    table = pd.DataFrame(rows).assign(score_std=None, oracle_accuracy=None, reason=None)
    assert swept(lambda *_: Outcome(table, [], ["--source a --target b"], whole=True, ui_hint=None)) == 0
    said = capsys.readouterr().out
    assert "the best: python jobs/adapt.py --config own.yaml --source a --target b" in said
    assert ("the unadapted model is better than every trial" in said) is (first == "unadapted")
