"""Two jobs that share a stage: one works, the other follows it; whoever dies or comes back too late spoils nothing.

The stages here train nothing and need no Ray: what is tested is who may write what, and when.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from clock import Clock

from coda_ray.config import Config, Place
from coda_ray.lease import Lease
from coda_ray.pipeline import stage as running
from coda_ray.pipeline.stage import DONE, LEASE_S, Stage, Workload, finish
from coda_ray.pipeline.train_stages import stage_tensors
from coda_ray.storage import Folder, open_place
from coda_ray.training import checkpoints
from coda_ray.training.checkpoints import Checkpoint
from synthetic import small_config

STEPS = 4


class DiedError(BaseException):
    """Stands for the end of a process: nobody catches it."""


class Work:
    """A stage of four steps, each with a checkpoint; `at` happens at a step."""

    def __init__(self, at=lambda step: None):
        self.at, self.begun = at, []

    def make(self, folder, report):
        return self.loop, folder

    def loop(self, config):
        folder = config["run"]
        found = checkpoints.load_latest(folder, STEPS)
        self.begun.append(found.step if found else 0)
        for step in range(self.begun[-1], STEPS):
            self.at(step)
            checkpoints.save(folder, Checkpoint(step + 1, {"w": torch.tensor([step])}, {}))
        folder.write("history.parquet", b"a table")
        return {**checkpoints.write_result(folder, "model.safetensors", {"w": torch.tensor([STEPS])}), "steps": STEPS}


def stage_of(work, **more):
    size = Workload("supervised", source="s", plates=1, tiles=1, steps=STEPS, minibatch=1, samples=STEPS)
    return Stage("pretrain", "a stage", {}, work.make, workload=size, **more)


def without_ray(loop, run, train, results, tell):
    return loop({"run": run, "tell": tell})


@pytest.fixture
def clock(monkeypatch):
    """Time of all jobs of a test, which run without Ray."""
    clock = Clock()
    monkeypatch.setattr(running, "launch", without_ray)
    monkeypatch.setattr(running, "Lease", partial(Lease, clock=clock, pause=clock.pause))
    return clock


@pytest.fixture(params=["folder", "s3"])
def config(request, tmp_path):
    """Results of each kind that refuses overwrites."""
    if request.param == "folder":
        return small_config(tmp_path)
    url = request.getfixturevalue("conditional")
    address = f"s3://bucket/{tmp_path.name}"
    return small_config(tmp_path, results=Place(address=address, endpoint_url=url, region="us-east-1").model_dump())


def assert_whole(config, facts):
    """Facts are those in storage, weights are theirs, and nothing else is left."""
    stage = stage_of(Work())
    folder = open_place(config.results).child(stage.path)
    assert folder.read_json(DONE) == facts
    assert stage_tensors(config, stage)["w"].tolist() == [STEPS]
    assert set(folder.names()) == {DONE, "stage.json", "history.parquet", facts["file"], "lease"}


class Other:
    """Another job, in a thread, that stops at a step until it may go on."""

    def __init__(self, config, step):
        self.reached, self.go_on, self.found = threading.Event(), threading.Event(), None
        self.step, self.work = step, Work(self._stop)
        self.thread = threading.Thread(target=self._run, args=(config,))
        self.thread.start()
        assert self.reached.wait(60)

    def _run(self, config):
        self.found = stage_of(self.work).run(config, None)

    def _stop(self, step):
        if step == self.step:
            self.reached.set()
            assert self.go_on.wait(60)

    def end(self):
        self.go_on.set()
        self.thread.join(60)
        assert not self.thread.is_alive()


def test_who_comes_second_follows_the_first_and_takes_its_result(config, clock, capsys):
    other, mine, told = Other(config, step=2), Work(), []
    looks = iter([lambda: None, lambda: None, other.end])
    clock.meanwhile = lambda: next(looks)()
    found = stage_of(mine).run(config, None, lambda done, total: told.append((done, total)))
    assert found == other.found
    assert (other.work.begun, mine.begun) == ([0], [])
    assert told == [(2, STEPS)]
    said = capsys.readouterr().out.splitlines()
    (line,) = [line for line in said if "at work" in line]
    assert f"(process {os.getpid()} on " in line
    assert line.endswith("is at work on it; this job waits, and takes its result")
    assert_whole(config, found)


def test_without_a_terminal_the_progress_of_the_other_job_is_printed_once_per_step(config, clock, capsys):
    other = Other(config, step=2)
    looks = iter([lambda: None, lambda: None, lambda: None, other.end])
    clock.meanwhile = lambda: next(looks)()
    stage_of(Work()).run(config, None)
    assert [line for line in capsys.readouterr().out.splitlines() if "step" in line] == ["a stage: the other job is at step 2/4"]


def test_a_finished_stage_asks_for_no_lease(config, clock):
    found = stage_of(Work()).run(config, None)
    terms = open_place(config.results).child(stage_of(Work()).path).names("lease")
    assert stage_of(Work()).run(config, None) == found
    assert open_place(config.results).child(stage_of(Work()).path).names("lease") == terms


@pytest.mark.parametrize("ends", [ValueError("broken"), KeyboardInterrupt(), SystemExit(1)], ids=lambda end: type(end).__name__)
def test_a_job_that_fails_or_is_interrupted_gives_its_stage_to_the_next(config, clock, ends):
    def fail(step):
        if step == 2:
            raise ends

    with pytest.raises(type(ends)):
        stage_of(Work(fail)).run(config, None)
    work = Work()
    found = stage_of(work).run(config, None)
    assert (work.begun, clock.now) == ([2], 0.0)
    assert_whole(config, found)


def test_a_job_that_waits_goes_on_where_the_other_one_failed(config, clock, capsys):
    def fail(step):
        if step == 3:
            raise ValueError("broken")

    other, work = Other(config, step=2), Work()
    other.work.at = fail
    failed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading, "excepthook", lambda what: failed.append(what.exc_value))
        clock.meanwhile = other.end
        found = stage_of(work).run(config, None)
    assert [str(error) for error in failed] == ["broken"]
    assert work.begun == [3]
    assert "the other job ended without a result; this job goes on with it" in capsys.readouterr().out
    assert_whole(config, found)


POINTS = ["before the weights", "between the weights and done.json", "after done.json"]


def die_at(point, patch, die):
    """Let the next job die at a point of its writing; it does not give its lease back."""

    def dies(*_):
        die()

    def keep(self):
        self._ended.set()
        if point == POINTS[2] and self.term:
            dies()

    patch.setattr(Lease, "release", keep)
    if point == POINTS[0]:
        patch.setattr(checkpoints, "write_result", dies)
    elif point == POINTS[1]:
        patch.setattr(running, "finish", dies)


def assert_taken_up(config, clock, point):
    """The next job comes to the result, from the checkpoints of the one that died."""
    work = Work()
    found = stage_of(work).run(config, None)
    finished = point == POINTS[2]
    assert work.begun == ([] if finished else [STEPS])
    assert clock.now == (0.0 if finished else pytest.approx(LEASE_S, rel=0.3))
    assert_whole(config, found)
    assert stage_of(work).run(config, None) == found


@pytest.mark.parametrize("point", POINTS)
def test_a_job_that_dies_while_it_writes_is_followed_by_another(config, clock, point):
    def die():
        raise DiedError

    with pytest.MonkeyPatch.context() as patch:
        die_at(point, patch, die)
        with pytest.raises(DiedError):
            stage_of(Work()).run(config, None)
    assert_taken_up(config, clock, point)


def die_here(settings, point):
    """Run the stage in this process, and be killed at a point of its writing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "launch", without_ray)
        die_at(point, patch, lambda: os.kill(os.getpid(), signal.SIGKILL))
        stage_of(Work()).run(Config.model_validate_json(settings), None)


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_a_process_that_is_killed_while_it_writes_is_followed_by_another(tmp_path, clock, point):
    config = small_config(tmp_path)
    code = "import sys; from test_two_jobs import die_here; die_here(*sys.argv[1:])"
    here = Path(__file__).parent
    path = os.pathsep.join(map(str, [here, here.parent, here.parents[1]]))
    command = [sys.executable, "-c", code, config.model_dump_json(), point]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert_taken_up(config, clock, point)


def test_a_job_that_wakes_up_after_its_lease_writes_nothing_and_takes_the_result_of_the_next(config, clock, capsys):
    sleeper, next_one = Other(config, step=2), Work()
    found = stage_of(next_one).run(config, None)
    assert next_one.begun == [2]
    written = {file.path: file.tag for file in open_place(config.results).files()}
    sleeper.end()
    assert sleeper.found == found
    assert sleeper.work.begun == [0]
    assert "has taken the lease" in capsys.readouterr().out
    now = {file.path: file.tag for file in open_place(config.results).files()}
    # Its lease is given back, though it is another's by now.
    assert {path for path, tag in now.items() if written.get(path) != tag} == {
        f"{stage_of(next_one).path}/lease/000001.released.json"
    }
    assert_whole(config, found)


def test_a_job_that_sleeps_before_its_last_write_does_not_overwrite(config, clock, monkeypatch):
    stopped, go_on, real = threading.Event(), threading.Event(), Folder.create

    def create(self, relative, data):
        if relative == DONE and not stopped.is_set():
            stopped.set()
            assert go_on.wait(60)
        return real(self, relative, data)

    monkeypatch.setattr(Folder, "create", create)
    found = []
    thread = threading.Thread(target=lambda: found.append(stage_of(Work()).run(config, None)))
    thread.start()
    assert stopped.wait(60)
    mine = stage_of(Work()).run(config, None)
    go_on.set()
    thread.join(60)
    assert found == [mine]
    assert_whole(config, mine)


def test_a_state_in_the_middle_waits_for_whoever_writes_its_checkpoints(config, clock):
    whole, work = stage_of(Work()), Work()
    middle = Stage("pretrain", "the middle", {"until": 2}, work.make, whole=whole)
    with Lease(open_place(config.results).child(f"{whole.path}/lease"), "anna", LEASE_S) as held:
        assert held.acquire(wait=False, say=pytest.fail)
        looks = iter([lambda: None, held.release])
        clock.meanwhile = lambda: next(looks)()
        assert middle.run(config, None)["steps"] == STEPS
    assert clock.now == 2 * running.LOOK_S


def test_weights_that_had_one_name_for_all_attempts_are_read(tmp_path):
    config, stage = small_config(tmp_path), stage_of(Work())
    folder = open_place(config.results).child(stage.path)
    sha256 = checkpoints.write_tensors(folder, "model.safetensors", {"w": torch.tensor([STEPS])})
    folder.write(DONE, json.dumps({"sha256": sha256, "steps": STEPS}).encode())
    assert stage_tensors(config, stage)["w"].tolist() == [STEPS]
    # Somebody with this release comes to the end of the same stage.
    assert finish(folder, checkpoints.write_result(folder, "model.safetensors", {"w": torch.tensor([1])}))["sha256"] == sha256
    assert stage_tensors(config, stage)["w"].tolist() == [STEPS]
