import re
import shlex

import pytest

from coda_ray.config import Config, ConfigError, build_config
from coda_ray.tracking.notes import (
    config_text,
    job_note,
    transfer_name,
    transfer_note,
    trial_name,
    trial_note,
)
from invented import transfer_record
from jobs.adapt import AdaptJob

SWEEP = {"tune": {"pairs": [["A", "B"], ["A", "C"]], "seeds": [0, 1], "method": "oda", "granularity": "plate"}}


@pytest.fixture
def job():
    config = Config.model_validate(SWEEP | {"adapt": {"lr": 2e-4}}).model_dump(mode="json")
    return {"kind": "tune", "name": "a sweep", "command": "python jobs/tune.py --config c.yaml", "config": config}


def read_again(note, job, folder):
    """What the jobs of a note's commands would be told."""
    (folder / "config.yaml").write_text(config_text(job))
    (block,) = re.findall(r"```\n(.*?)```", note, re.DOTALL)
    found = []
    for line in block.replace("\\\n", "").strip().splitlines():
        python, script, flag, file, *words = shlex.split(line)
        assert (python, script, flag, file) == ("python", "jobs/adapt.py", "--config", "config.yaml")
        found.append(build_config(AdaptJob, str(folder / "config.yaml"), words))
    return found


def test_a_transfers_command_asks_for_that_transfer(job, tmp_path):
    record = transfer_record("A", "B", "coda", 3, granularity="batch", unit="b1", scope="whole", split="compounds")
    (again,) = read_again(transfer_note(record, job), job, tmp_path)
    assert (again.source, again.target, again.method, again.granularity, again.seed) == ("A", "B", "coda", "batch", 3)
    assert again.split == "compounds"
    assert again.adapt.lr == 2e-4


def test_a_trials_commands_adapt_every_pair_and_seed_at_its_values(job, tmp_path):
    point = {"granularity": "batch", "adapt.lr": 1e-3, "adapt.minibatch_unit": 16, "adapt.dino.ema_start": 0.99}
    found = read_again(trial_note({"point": point}, job), job, tmp_path)
    assert [(one.source, one.target, one.seed) for one in found] == [("A", "B", 0), ("A", "B", 1), ("A", "C", 0), ("A", "C", 1)]
    for one in found:
        assert (one.method, one.granularity, one.adapt.lr) == ("oda", "batch", 1e-3)
        assert (one.adapt.minibatch_unit, one.adapt.dino.ema_start) == (16, 0.99)


def test_what_a_command_would_not_understand_is_seen_here(job, tmp_path):
    with pytest.raises(ConfigError, match=r"adapt\.learning-rate"):
        read_again(trial_note({"point": {"adapt.learning_rate": 1.0}}, job), job, tmp_path)


def test_of_very_many_commands_some_are_shown_and_the_rest_counted(job, tmp_path):
    job["config"]["tune"]["seeds"] = list(range(50))
    note = trial_note({"point": {"adapt.lr": 1e-3}}, job)
    assert len(note) < 8000
    assert "# and 84 more, which differ in source, target and seed\n```\n" in note
    assert len(read_again(note.replace("# and 84 more, which differ in source, target and seed\n", ""), job, tmp_path)) == 16


def test_names_leave_out_what_goes_without_saying():
    whole = transfer_record("A", "B", "coda", 0)
    assert transfer_name(whole) == "coda A → B, seed 0"
    unit = whole | {"granularity": "batch", "unit": "b1", "scope": "adapted"}
    assert transfer_name(unit) == "coda A → B, batch b1, seed 0"
    assert transfer_name(unit | {"scope": "whole", "split": "compounds"}) == (
        "coda A → B, batch b1, scored on all, compounds held out, seed 0"
    )
    assert trial_name({"point": {"granularity": "batch", "adapt.lr": 0.00012345678, "adapt.steps": 100}}) == (
        "granularity batch, lr 0.0001235, steps 100"
    )


def test_a_note_holds_summary_and_command_however_long_the_summary_is(job):
    for summary in ("| best |", "a line\n" * 5000):
        note = job_note(job | {"summary": summary}, None)
        assert note.startswith(summary[:6])
        assert job["command"] in note
        assert "config.yaml" in note
        assert len(note) < 8000
    assert "every trial is in report/trials.csv" in note
    assert "the whole matrix is in matrix.md" in job_note(job | {"kind": "matrix", "summary": summary}, None)
    assert job_note(job, None).startswith("Made by")
