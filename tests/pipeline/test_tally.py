"""Stages tell how far they are, and nothing that happens to who listens is felt by them."""

import copy

import pytest
import ray

from coda_ray.pipeline import tally
from coda_ray.pipeline.tally import MOST_PENDING, Tally, Teller


class Counts:
    """In the place of an actor's handle."""

    def __init__(self, error=None):
        self.error, self.told = error, []
        self.tell = self

    def remote(self, *what):
        self.told.append(what)
        if self.error:
            raise self.error


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(tally.time, "monotonic", lambda: now[0])
    return now


def test_the_first_and_the_last_of_a_total_are_told_and_the_others_twice_a_second(clock):
    counts = Counts()
    tell = Teller(counts, "k")
    tell(0, 0)
    for step in range(101):
        tell(step, 100)
        clock[0] += 1 / 64
    assert counts.told == [("k", 0, 0), *(("k", step, 100) for step in (0, 32, 64, 96, 100))]


def test_another_process_tells_by_its_own_clock(clock):
    tell = Teller(Counts(), "k")
    tell(0, 9)
    there = copy.copy(tell)  # by what pickle takes too
    clock[0] = 0.0
    there(1, 9)
    assert there._counts.told == [("k", 0, 9), ("k", 1, 9)]


def test_nothing_that_telling_raises_reaches_the_stage():
    Teller(Counts(ray.exceptions.RaySystemError("no Ray")), "k")(1, 2)
    Teller(Counts(ray.exceptions.PendingCallsLimitExceeded("full")), "k")(1, 2)
    Teller(Counts(RuntimeError("anything")), "k")(1, 2)


def heard(told, wanted):
    """Ask until that is known of the stages; what another process tells may be on its way."""
    known = {}
    for _ in range(1000):
        known |= told.news()
        if wanted.items() <= known.items():
            return True
        ray.wait([told._asked])
    return False


@pytest.mark.slow
def test_news_come_from_another_process_once_and_a_dead_tally_has_none(ray_cluster):
    told = Tally()
    report = ray.remote(num_cpus=0)(lambda tell: [tell(done, 3) for done in range(4)])
    ray.get(report.remote(told.teller("there")))
    told.teller("here")(1, 2)
    assert heard(told, {"here": (1, 2), "there": (3, 3)})
    assert told.news() == {}
    ray.kill(told.actor)
    tell = told.teller("there")
    for done in range(2 * MOST_PENDING):
        tell._next = 0.0
        tell(done, 2 * MOST_PENDING)
    ray.get(report.remote(tell))
    assert [told.news() for _ in range(20)] == [{}] * 20
