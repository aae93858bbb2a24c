"""The lease: signs of life, terms, and what a holder that comes back too late may still do."""

import json
import logging
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from clock import Clock

from coda_ray import storage
from coda_ray.jump.layout import PlateName
from coda_ray.lease import Lease, LostLeaseError, _newest
from coda_ray.online.ledger import Ledger, LostLedgerError

# So long that the thread of a holder gives no sign of life while a test lasts: tests do so by hand.
LEASE_S = 4000.0
PLATE = PlateName("sim_b", "run 1", "105360")


@pytest.fixture
def folder(exclusive):
    return exclusive.child("watch/lease")


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def lease(folder, clock):
    """Makes leases of this folder; none is held afterwards."""
    made = []

    def make(by, clock=clock, lease_s=LEASE_S):
        made.append(Lease(folder, by, lease_s, clock, clock.pause))
        return made[-1]

    yield make
    for one in made:
        one.release()


def quiet(text):
    pytest.fail(f"told {text!r}")


def test_a_free_lease_is_taken_at_once_and_given_back(lease, folder, clock):
    with lease("anna") as first:
        assert first.acquire(wait=False, say=quiet)
        assert first.term == 1
        first.check()
        held = json.loads(folder.read("000001.json"))
        assert (held["by"], held["pid"]) == ("anna", os.getpid())
        assert "000001.released.json" not in folder.names()
    assert "000001.released.json" in folder.names()
    assert first.term is None
    second = lease("bert")
    assert second.acquire(wait=False, say=quiet)
    assert second.term == 2
    assert clock.now == 0.0


@pytest.mark.parametrize("wait", [True, False])
def test_a_holder_whose_beat_stops_loses_to_a_contender(lease, clock, wait, caplog):
    holder, other, told = lease("anna"), lease("bert"), []
    assert holder.acquire(wait=False, say=quiet)
    assert other.acquire(wait, told.append)
    assert (other.term, clock.now) == (2, LEASE_S)
    assert len(told) == 1
    assert told[0].startswith(f"anna (process {os.getpid()} on ")
    other.check()
    with pytest.raises(LostLeaseError, match=r"bert .* has taken the lease from anna"):
        holder.check()
    # A sign of life of a holder that wakes up changes nothing.
    holder.beat()
    other.check()
    with pytest.raises(LostLeaseError, match="has taken the lease"):
        holder.check()


def test_a_holder_that_lives_is_told_and_left_alone(lease, clock, folder):
    holder, other = lease("anna"), lease("bert")
    assert holder.acquire(wait=False, say=quiet)
    clock.meanwhile = holder.beat
    assert not other.acquire(wait=False, say=lambda text: None)
    assert other.term is None
    assert clock.now <= LEASE_S
    holder.check()
    assert "000002.json" not in folder.names()


def test_a_contender_waits_until_the_lease_is_given_back(lease, clock):
    holder, other = lease("anna"), lease("bert")
    assert holder.acquire(wait=False, say=quiet)
    looks = []

    def meanwhile():
        looks.append(clock.now)
        holder.beat() if len(looks) < 20 else holder.release()

    clock.meanwhile = meanwhile
    assert other.acquire(wait=True, say=lambda text: None)
    assert clock.now > 4 * LEASE_S
    assert len(looks) == 20
    assert other.term == 2


def test_a_pause_of_the_contender_is_no_silence_of_the_holder(lease, clock, folder, monkeypatch):
    holder, other = lease("anna"), lease("bert")
    assert holder.acquire(wait=False, say=quiet)
    holder.beat()
    real, reads = storage.Folder.read, []

    def read(self, relative):
        content = real(self, relative)
        if relative.endswith(".beat.json"):
            reads.append(content)
            if len(reads) == 2:
                # The contender stops here for long, while the holder goes on.
                clock.now += 10 * LEASE_S
                holder.beat()
        return content

    monkeypatch.setattr(storage.Folder, "read", read)
    assert not other.acquire(wait=False, say=lambda text: None)
    holder.check()


def test_a_holder_that_is_silent_for_too_long_stops_before_anyone_comes(lease, clock):
    holder = lease("anna")
    assert holder.acquire(wait=False, say=quiet)
    clock.now = LEASE_S
    holder.check()
    clock.now = LEASE_S + 1
    with pytest.raises(LostLeaseError, match=r"for 4001 s, and the lease of anna ends after 4000 s"):
        holder.check()
    holder.beat()
    holder.check()


def test_a_slow_sign_of_life_counts_from_its_beginning(lease, clock, monkeypatch):
    holder = lease("anna")
    assert holder.acquire(wait=False, say=quiet)
    real = storage.Folder.write

    def write(self, relative, data):
        real(self, relative, data)
        clock.now += LEASE_S + 1

    monkeypatch.setattr(storage.Folder, "write", write)
    holder.beat()
    with pytest.raises(LostLeaseError, match="no sign of life"):
        holder.check()


def test_without_a_lease_nothing_may_be_written(lease):
    with pytest.raises(LostLeaseError, match="bert does not hold the lease; acquire it first"):
        lease("bert").check()


def test_of_many_who_want_a_lease_one_gets_each_term(folder):
    people, rounds = 6, 8
    barrier = threading.Barrier(people, timeout=60)

    def contend(who):
        terms = []
        for _ in range(rounds):
            one = Lease(folder, f"{who}", LEASE_S)
            term = _newest(folder) + 1
            barrier.wait()
            taken = one._take(term)
            barrier.wait()
            if taken:
                one.check()
                terms.append(one.term)
                one.release()
            barrier.wait()
        return terms

    with ThreadPoolExecutor(people) as pool:
        terms = sorted(term for found in pool.map(contend, range(people)) for term in found)
    assert terms == list(range(1, rounds + 1))


def test_of_two_who_find_a_dead_holder_one_goes_on(lease, clock, folder):
    dead, first, second = lease("anna"), lease("bert"), lease("cleo")
    assert dead.acquire(wait=False, say=quiet)
    real = Lease._take

    def slower(self, term):
        # The other one is faster by a hair.
        if self is second and term == 2:
            assert real(first, term)
            clock.meanwhile = first.beat
        return real(self, term)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lease, "_take", slower)
        assert not second.acquire(wait=False, say=lambda text: None)
    first.check()
    assert [name for name in folder.names() if name.count(".") == 1] == ["000001.json", "000002.json"]


def test_a_holder_that_wakes_up_writes_no_entry(lease, folder, clock):
    logs = folder.child("ledger")
    holder, other = lease("anna"), lease("bert")
    assert holder.acquire(wait=False, say=quiet)
    before = Ledger.open(logs, {}, "anna")
    before.append(PLATE, "taken")
    holder.check()
    # Here the holder stops for long, and the next one begins.
    after = Ledger.open(logs, {}, "bert")
    assert other.acquire(wait=True, say=lambda text: None)
    after.claim("watching", term=other.term)
    with pytest.raises(LostLedgerError, match="bert wrote this entry"):
        before.append(PLATE, "done")
    with pytest.raises(LostLeaseError, match="bert"):
        holder.check()
    other.check()
    after.append(PLATE, "done")
    assert [entry.by for entry in Ledger.open(logs, {}, "cleo").entries] == ["anna", "anna", "bert", "bert"]


def test_a_thread_gives_signs_of_life_until_the_release(folder, monkeypatch):
    beats, enough, real = [], threading.Event(), storage.Folder.write

    def write(self, relative, data):
        real(self, relative, data)
        if relative.endswith(".beat.json"):
            beats.append(json.loads(data)["beat"])
            if len(beats) == 3:
                enough.set()

    monkeypatch.setattr(storage.Folder, "write", write)
    with Lease(folder, "anna", 0.04) as one:
        assert one.acquire(wait=False, say=quiet)
        (thread,) = [thread for thread in threading.enumerate() if thread.name == "lease 1"]
        assert enough.wait(60)
    thread.join()
    assert beats == list(range(1, len(beats) + 1))
    assert json.loads(folder.read("000001.beat.json")) == {"beat": beats[-1]}


def test_storage_that_fails_is_asked_again_for_a_sign_of_life(folder, monkeypatch, caplog):
    answers, written, real = iter([OSError("busy"), OSError("busy")]), threading.Event(), storage.Folder.write

    def write(self, relative, data):
        if relative.endswith(".beat.json"):
            error = next(answers, None)
            if error:
                raise error
        real(self, relative, data)
        written.set()

    monkeypatch.setattr(storage.Folder, "write", write)
    clock = Clock()
    with Lease(folder, "anna", 0.04, clock) as one:
        assert one.acquire(wait=False, say=quiet)
        assert written.wait(60)
        one.check()
    assert sum("is tried again: busy" in record.message for record in caplog.records) == 2


def test_a_release_that_storage_refuses_is_told_and_ends_the_lease(lease, folder, clock, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    holder, other = lease("anna"), lease("bert")
    assert holder.acquire(wait=False, say=quiet)
    with monkeypatch.context() as patch:
        patch.setattr(storage.Folder, "write", lambda self, relative, data: (_ for _ in ()).throw(OSError("busy")))
        holder.release()
    assert "could not be released, and ends in 4000 s: busy" in caplog.text
    assert other.acquire(wait=True, say=lambda text: None)
    assert clock.now == LEASE_S


def test_a_damaged_term_is_still_a_term(lease, folder, clock):
    folder.write("000007.json", b"{")
    told = []
    one = lease("anna")
    assert one.acquire(wait=True, say=told.append)
    assert one.term == 8
    assert "the holder of term 7" in told[0]


def test_terms_that_are_over_leave_no_files_but_the_last(folder):
    for _ in range(5):
        with Lease(folder, "one", 60.0) as lease:
            assert lease.acquire(wait=True, say=print)
            assert not lease.took_over
    assert {name.partition(".")[0] for name in folder.names()} == {"000003", "000004", "000005"}


def test_a_holder_whose_term_was_deleted_has_lost_it(folder):
    sleeper = Lease(folder, "sleeper", 60.0)
    assert sleeper.acquire(wait=True, say=print)
    folder.delete("000001.json")
    with pytest.raises(LostLeaseError, match="has taken the lease from sleeper"):
        sleeper.check()
    sleeper.release()


def test_a_guarded_folder_is_written_to_until_a_newer_term_is_taken_wherever_it_is(lease, folder, clock):
    holder, other = lease("anna"), lease("bert")
    with pytest.raises(LostLeaseError, match="anna does not hold the lease"):
        holder.guard(folder)
    assert holder.acquire(wait=False, say=quiet)
    guarded = pickle.loads(pickle.dumps(holder.guard(folder.child("work"))))  # noqa: S301 (our own)
    guarded.write("table", b"1")
    assert guarded.create("note", b"1")
    assert not guarded.create("note", b"2")
    assert other.acquire(wait=True, say=lambda text: None)
    for late in (partial(guarded.write, "table", b"2"), partial(guarded.create, "more", b"2"), partial(guarded.delete, "note")):
        with pytest.raises(LostLeaseError, match=r"bert .* has taken the lease meanwhile"):
            late()
    work = folder.child("work")
    assert {name: work.read(name) for name in work.names()} == {"table": b"1", "note": b"1"}


def test_waiting_ends_where_the_lease_is_no_longer_wanted(lease, clock):
    holder, other = lease("anna"), lease("bert")
    assert holder.acquire(wait=False, say=quiet)
    assert not other.acquire(wait=True, say=lambda text: None, unless=lambda: clock.now > 0)
    assert (other.term, clock.now) == (None, other.beat_s)


def test_who_has_waited_for_long_looks_less_often(folder, clock):
    pauses = []

    def pause(seconds):
        pauses.append(seconds)
        clock.pause(seconds)

    with Lease(folder, "anna", LEASE_S) as holder, Lease(folder, "bert", LEASE_S, clock, pause, look_s=1.0) as other:
        assert holder.acquire(wait=False, say=quiet)
        clock.meanwhile = lambda: holder.beat() if clock.now < 4 * LEASE_S else holder.release()
        assert other.acquire(wait=True, say=lambda text: None)
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (1.0, other.beat_s)
