"""The state of a plate is what its entries say, and nothing else."""

import pandas as pd

from coda_ray.jump.layout import PlateName
from coda_ray.online.board import COLUMNS, journeys, plates_table
from coda_ray.online.ledger import Entry

P, Q = PlateName("b", "b0", "p"), PlateName("b", "b1", "q")


def entries(*said):
    """Entries of (plate, state, facts), a minute apart."""
    return [
        Entry(number, plate, state, facts, f"2026-01-01T00:{number:02d}:00+00:00", "me")
        for number, (plate, state, facts) in enumerate(said)
    ]


FAILURE = {"step": "ingest", "reason": "IngestError: broken"}


def test_plates_keep_the_order_in_which_they_came():
    said = [(None, "begun", {}), (Q, "arrived", {}), (P, "arrived", {}), (Q, "ingested", {"tiles": 3})]
    found = journeys(entries(*said))
    assert [(journey.plate, journey.number, journey.state) for journey in found.values()] == [
        (Q, 1, "ingested"),
        (P, 2, "arrived"),
    ]
    assert found[Q].facts == {"arrived": {}, "ingested": {"tiles": 3}}
    assert found[Q].known == {"tiles": 3}


def test_a_failed_step_is_done_again_when_its_time_has_come():
    journey = journeys(entries((P, "arrived", {}), (P, "failed", FAILURE)))[P]
    assert journey.state == "arrived"
    assert not journey.ended
    failed = pd.Timestamp("2026-01-01T00:01:00Z").timestamp()
    assert not journey.is_due(failed + 59, 60)
    assert journey.is_due(failed + 60, 60)


def test_a_model_that_could_not_be_made_is_chosen_anew():
    steps = [(P, state, {}) for state in ("arrived", "ingested", "checked", "chosen")]
    journey = journeys(entries(*steps, (P, "failed", {"step": "adapt", "reason": "r"})))[P]
    assert journey.state == "checked"
    again = journeys(entries(*steps, (P, "failed", {"step": "predict", "reason": "r"})))[P]
    assert again.state == "chosen"


def test_what_has_ended_is_not_due():
    for last in ("aside", "reported"):
        journey = journeys(entries((P, "arrived", {}), (P, "failed", FAILURE), (P, last, {"reason": "r"})))[P]
        assert journey.ended
        assert not journey.is_due(1e12, 0)


def test_the_table_has_a_row_per_plate_and_says_why_one_was_set_aside():
    said = [(P, "arrived", {"sites": 8, "missing": 0}), (P, "failed", FAILURE), (P, "failed", FAILURE)]
    said += [(P, "aside", {"reason": FAILURE["reason"]}), (Q, "arrived", {"sites": 8, "missing": 1})]
    table = plates_table(journeys(entries(*said)).values())
    assert table["plate"].tolist() == ["p", "q"]
    assert table["state"].tolist() == ["aside", "arrived"]
    assert table["tries"].tolist() == [2, 1]
    assert table["reason"][0] == "IngestError: broken"
    assert table["reason"].isna().tolist() == [False, True]
    assert table["missing"].tolist() == [0, 1]
    assert {name for names in COLUMNS.values() for name in names} <= set(table)
    assert list(plates_table([])) == list(table)
