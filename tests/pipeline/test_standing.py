"""Rows and times of a job by what its stages tell."""

from itertools import pairwise

import numpy as np
import pytest

from coda_ray.pipeline.standing import REMEMBERED_S, Standing, makespan
from invented import invented_chain, invented_stage

LEARN, ADAPT, LOOK, DRAW = STAGES = invented_chain()


def steadily(standing, one, *, steps, step_s, begin=0.0, done=0):
    """A stage begins, and tells the end of each step; give the time of the last."""
    standing.told(one.key, 0, 0, begin)
    for step in range(done, steps + 1):
        standing.told(one.key, step, 100, begin + (step - done) * step_s)
    return begin + (steps - done) * step_s


def test_a_stage_that_has_not_begun_waits_and_one_that_tells_nothing_is_timed():
    standing = Standing(STAGES, {LEARN.key}, slots=2)
    standing.told(ADAPT.key, 0, 0, 10.0)
    view = standing.view(14.0)
    assert [(row.title, row.done, row.total, row.elapsed_s, row.left_s) for row in view.rows] == [("adapt", 0, 0, 4.0, None)]
    assert (view.finished, view.failed, view.total, view.waiting) == (1, 0, 4, {"evaluate": 1, "map": 1})
    assert (view.left_s, view.whole) == (None, False)


def test_the_time_left_is_that_of_the_steps_left_and_the_present_step_counts_down():
    standing = Standing(STAGES, (), slots=2)
    now = steadily(standing, LEARN, steps=40, step_s=2.0)
    for later, left in ((0.0, 120.0), (0.5, 119.5), (2.0, 118.0), (60.0, 118.0)):
        (row,) = standing.view(now + later).rows
        assert row.left_s == pytest.approx(left)


def test_the_speed_follows_a_stage_that_becomes_slower():
    standing = Standing([LEARN], (), slots=1)
    now = steadily(standing, LEARN, steps=50, step_s=1.0)
    lefts = []
    for step in range(51, 91):
        now += 6.0
        standing.told(LEARN.key, step, 100, now)
        lefts.append(standing.view(now).rows[0].left_s / (100 - step))
    assert all(1.0 < before < after < 6.0 for before, after in pairwise(lefts))
    # By then the fast steps weigh exp(-8) of the slow ones.
    assert 40 * 6.0 / REMEMBERED_S == 8.0
    assert lefts[-1] == pytest.approx(6.0, abs=0.01)


def test_what_is_told_again_begins_again():
    standing = Standing([LEARN], (), slots=1)
    now = steadily(standing, LEARN, steps=50, step_s=1.0)
    standing.told(LEARN.key, 0, 0, now + 10)  # its worker died; it goes on from a checkpoint
    standing.told(LEARN.key, 40, 100, now + 15)
    (row,) = standing.view(now + 15).rows
    assert (row.done, row.elapsed_s, row.left_s) == (40, 5.0, None)
    standing.told(LEARN.key, 42, 100, now + 21)
    assert standing.view(now + 21).rows[0].left_s == pytest.approx(58 * 3.0)


def test_a_job_ends_when_all_its_speeds_are_known_and_before_that_later_than_what_is():
    standing = Standing([LEARN, ADAPT, LOOK], (), slots=2)
    now = steadily(standing, LEARN, steps=40, step_s=2.0)
    view = standing.view(now)
    # 120 s of pre-training, and half as many samples of the same kind after it; of evaluations nothing is known.
    assert (view.left_s, view.whole) == (pytest.approx(120 + 100), False)
    standing.ended(LEARN.key, 220.0, failed=False)
    assert standing.view(220.0).left_s == pytest.approx(110)  # with what it took beside its steps
    steadily(standing, ADAPT, steps=0, step_s=1.0, begin=220.0)
    assert standing.view(230.0).left_s == pytest.approx(100)
    standing.ended(ADAPT.key, 300.0, failed=False)
    now = steadily(standing, LOOK, steps=50, step_s=0.1, begin=301.0)
    view = standing.view(now)
    assert (view.left_s, view.whole) == (pytest.approx(5.0), True)
    standing.ended(LOOK.key, now, failed=False)
    view = standing.view(now)
    assert (view.rows, view.finished, view.waiting, view.left_s) == ((), 3, {}, None)


def test_work_that_is_not_counted_is_measured_by_the_stage():
    others = [invented_stage("map", f"map {i}") for i in range(4)]
    standing = Standing(others, (), slots=1)
    standing.told(others[0].key, 0, 0, 0.0)
    standing.ended(others[0].key, 7.0, failed=False)
    standing.told(others[1].key, 0, 0, 7.0)
    view = standing.view(9.0)
    assert (view.left_s, view.whole) == (5.0 + 2 * 7.0, True)


def test_a_stage_that_went_on_from_a_checkpoint_is_measured_by_what_was_left_to_do():
    standing = Standing([LEARN, ADAPT], (), slots=1)
    now = steadily(standing, LEARN, steps=100, step_s=2.0, done=75)
    standing.ended(LEARN.key, now, failed=False)
    assert standing.view(now).left_s == pytest.approx(100)


def test_the_end_of_a_stage_is_final_and_a_failed_one_teaches_no_speed():
    standing = Standing([LEARN, ADAPT], (), slots=1)
    now = steadily(standing, LEARN, steps=10, step_s=2.0)
    standing.ended(LEARN.key, now, failed=True)
    standing.told(LEARN.key, 11, 100, now)
    standing.told("of another job", 1, 2, now)
    view = standing.view(now)
    assert (view.rows, view.failed, view.waiting, view.left_s) == ((), 1, {"adapt": 1}, None)
    standing.ended(ADAPT.key, now, failed=True)  # it needed the other, and never began
    assert (standing.view(now).failed, standing.view(now).waiting) == (2, {})


def ticking(seconds, needs, slots):
    """The obvious way, second by second."""
    left, done, underway, now = dict(seconds), set(), [], 0
    ready = [piece for piece in seconds if not set(needs[piece]) & seconds.keys()]
    while len(done) < len(seconds):
        while ready and len(underway) < slots:
            underway.append(ready.pop(0))
        now += 1
        for piece in underway:
            left[piece] -= 1
        over = [piece for piece in sorted(underway) if not left[piece]]
        underway = [piece for piece in underway if left[piece]]
        for piece in over:
            done.add(piece)
            ready += [f for f in seconds if piece in needs[f] and set(needs[f]) & seconds.keys() <= done and f not in ready]
    return now


@pytest.mark.parametrize("seed", range(20))
def test_the_end_of_work_with_needs_is_that_of_a_clock_that_ticks(seed):
    rng = np.random.default_rng(seed)
    names = [f"{i:02d}" for i in range(rng.integers(1, 12))]
    seconds = {name: int(rng.integers(1, 9)) for name in names}
    needs = {name: {"finished", *(n for n in names[:i] if rng.random() < 0.3)} for i, name in enumerate(names)}
    slots = int(rng.integers(1, 5))
    assert makespan(seconds, needs, slots) == ticking(seconds, needs, slots)
