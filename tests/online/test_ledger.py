import json
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from coda_ray import storage
from coda_ray.config import ConfigError, Place
from coda_ray.jump.layout import PlateName
from coda_ray.online.ledger import Entry, Ledger, LostLedgerError
from coda_ray.storage import open_place

IDENTITY = {"source": "sim_a", "model": {"arch": "vit", "depth": 2}}
PLATE = PlateName("sim_b", "run 1", "105360")
OTHER = PlateName("sim_b", "run 1", "105361")


@pytest.fixture
def folder(exclusive):
    return exclusive.child("watch/ledger")


def begin(folder, by="anna"):
    return Ledger.open(folder, IDENTITY, by)


def test_entries_are_kept_in_order(folder):
    ledger = begin(folder)
    taken = ledger.append(PLATE, "taken", sites=12, missing=[1, 2])
    ledger.append(OTHER, "taken")
    ledger.append(None, "paused", why="café")
    done = ledger.append(PLATE, "done", model=None)
    assert [entry.number for entry in ledger.entries] == [0, 1, 2, 3, 4]
    assert ledger.entries[0].facts == IDENTITY
    assert ledger.entries[0].state == "begun"
    assert taken == Entry(1, PLATE, "taken", {"sites": 12, "missing": [1, 2]}, taken.at, "anna")
    assert [entry for entry in ledger.entries if entry.plate == PLATE] == [taken, done]
    assert begin(folder, "bert").entries == ledger.entries
    assert [file.path for file in folder.files()] == [f"00000{n}.json" for n in range(5)]


def test_refresh_reads_what_others_wrote(folder):
    ledger, other = begin(folder), begin(folder, "bert")
    written = [other.append(PLATE, f"step {n}") for n in range(40)]
    assert len(ledger.entries) == 1
    ledger.refresh()
    ledger.refresh()
    assert ledger.entries[1:] == written
    assert ledger.append(PLATE, "more").number == 41


def test_who_comes_late_is_told_and_writes_nothing(folder):
    ledger, other = begin(folder), begin(folder, "bert")
    first = ledger.append(PLATE, "taken")
    before = folder.read("000001.json")
    with pytest.raises(LostLedgerError, match=r"000001\.json: anna wrote this entry at .*, before bert could"):
        other.append(PLATE, "taken")
    assert folder.read("000001.json") == before
    assert len(other.entries) == 1
    other.refresh()
    assert other.entries[-1] == first


def test_a_claim_takes_the_number_that_another_counts_on(folder, monkeypatch):
    ledger, other = begin(folder), begin(folder, "bert")
    ledger.append(PLATE, "taken")
    real, late = other.refresh, iter([lambda: ledger.append(PLATE, "adapted"), lambda: None])

    def refresh():
        real()
        next(late)()

    # Written between the look and the claim.
    monkeypatch.setattr(other, "refresh", refresh)
    claim = other.claim("watching", term=2)
    assert (claim.number, claim.plate, claim.state, claim.facts) == (3, None, "watching", {"term": 2})
    assert [entry.state for entry in other.entries] == ["begun", "taken", "adapted", "watching"]
    with pytest.raises(LostLedgerError):
        ledger.append(PLATE, "done")


def test_of_many_writers_one_writes_each_number(folder):
    people = 6
    start = Barrier(people, timeout=60)

    def write(who):
        ledger, won = begin(folder, f"{who}"), []
        for turn in range(15):
            start.wait()
            try:
                won.append(ledger.append(PLATE, "taken", turn=turn))
            except LostLedgerError:
                ledger.refresh()
            start.wait()
            ledger.refresh()
        return won

    with ThreadPoolExecutor(people) as pool:
        won = [entry for entries in pool.map(write, range(people)) for entry in entries]
    ledger = begin(folder)
    assert sorted(won, key=lambda entry: entry.number) == ledger.entries[1:]
    assert {entry.facts["turn"] for entry in won} == set(range(15))


def test_of_many_who_begin_a_ledger_all_get_the_same(folder):
    start = Barrier(6, timeout=60)

    def open_(who):
        start.wait()
        return begin(folder, f"{who}").entries

    with ThreadPoolExecutor(6) as pool:
        first, *others = pool.map(open_, range(6))
    assert all(entries == first for entries in others)


@pytest.mark.parametrize(
    ("now", "told"),
    [
        ({"source": "sim_c", "model": IDENTITY["model"]}, 'source = "sim_a", and now it is "sim_c"'),
        ({"source": "sim_a", "model": {"arch": "vit", "depth": 3}}, "model.depth = 2, and now it is 3"),
        ({"source": "sim_a"}, r'model = {"arch": "vit", "depth": 2}, and now it is not given'),
        ({**IDENTITY, "seed": None}, "seed = not given, and now it is null"),
    ],
    ids=["source", "depth", "no model", "seed"],
)
def test_another_identity_is_told(folder, now, told):
    begin(folder)
    with pytest.raises(ConfigError) as caught:
        Ledger.open(folder, now, "bert")
    assert f"{told}; " in str(caught.value)
    assert folder.address() in str(caught.value)
    assert "watch.out=another folder" in str(caught.value)


def test_an_identity_is_compared_as_json_holds_it(folder):
    Ledger.open(folder, {"channels": ("DNA", "ER")}, "anna")
    assert Ledger.open(folder, {"channels": ["DNA", "ER"]}, "bert").entries[0].by == "anna"


def damaged(**changes):
    entry = {"number": 1, "plate": list(PLATE), "state": "taken", "facts": {}, "at": "", "by": "", **changes}
    return json.dumps({name: value for name, value in entry.items() if value is not ...}).encode()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"number": 1', "not an entry"),
        (b"[1]", "not an entry"),
        (b"\xff\xfe\xfd", "not an entry"),
        (damaged(by=...), "not an entry of a ledger .KeyError: 'by'"),
        (damaged(plate=["sim_b"]), "not an entry"),
        (damaged(number=2), "holds the entry of number 2"),
    ],
    ids=["cut", "list", "no text", "no by", "short plate", "other number"],
)
def test_a_damaged_entry_is_named(folder, content, told):
    begin(folder)
    folder.write("000001.json", content)
    with pytest.raises(ValueError, match=rf"000001\.json: {told}.*watch\.out=another folder"):
        begin(folder)


@pytest.mark.parametrize("name", ["report.html", "1.json", "000001.json.bak"])
def test_a_foreign_file_is_named(folder, name):
    begin(folder)
    folder.write(name, b"x")
    with pytest.raises(ValueError, match=rf"ledger/{name}: belongs to no ledger"):
        begin(folder)


def test_a_missing_entry_is_named(folder):
    ledger = begin(folder)
    for _ in range(3):
        ledger.append(PLATE, "taken")
    folder.delete("000002.json")
    with pytest.raises(ValueError, match=r"000002\.json: is missing, though later entries"):
        begin(folder)


def test_hidden_files_and_folders_are_left_alone(folder):
    begin(folder)
    folder.write(".DS_Store", b"x")
    folder.write("lease/000001.json", b"x")
    folder.write("reports/x.html", b"x")
    assert len(begin(folder).entries) == 1


def test_facts_that_json_cannot_hold_are_refused_and_not_written(folder):
    ledger = begin(folder)
    with pytest.raises(ValueError, match="JSON compliant"):
        ledger.append(PLATE, "taken", distance=float("nan"))
    assert [file.path for file in folder.files()] == ["000000.json"]


def test_an_entry_whose_answer_was_lost_is_written_once(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.0)
    folder = open_place(Place(address=str(tmp_path / "ledger")))
    ledger, real, calls = begin(folder), storage.os.link, []

    def link(part, path):
        calls.append(path)
        real(part, path)
        if len(calls) == 1:
            raise TimeoutError("no answer")

    monkeypatch.setattr(storage.os, "link", link)
    entry = ledger.append(PLATE, "taken")
    assert len(calls) == 2
    assert ledger.entries[1:] == [entry] == begin(folder).entries[1:]


def test_a_ledger_begins_only_where_writes_are_exclusive(folder, monkeypatch):
    monkeypatch.setattr(storage.Folder, "create", lambda self, relative, data: self.write(relative, data) is None)
    with pytest.raises(OSError, match="ignores conditional writes"):
        begin(folder)
    assert folder.files() == []
