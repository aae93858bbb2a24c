"""The plan of every strategy, beside one that was written by hand."""

from typing import get_args

import pytest

from coda_ray.config import Strategy
from coda_ray.jump.layout import PlateName
from coda_ray.online.strategies import MEANING, Adaptation, Turn, turns_of

# Two batches; handed over in another order than that of arrival, and names that sort otherwise without their batch.
P1, P2, P3, P4 = (PlateName("s", *name) for name in (("b0", "p2"), ("b0", "p3"), ("b1", "p0"), ("b1", "p1")))
GIVEN = [P4, P1, P3, P2]
ON_1 = Adaptation("plate", "p2", ("p2",))
ON_2 = Adaptation("plate", "p3", ("p2", "p3"))
ON_3 = Adaptation("plate", "p0", ("p2", "p3", "p0"))
ON_4 = Adaptation("plate", "p1", ("p2", "p3", "p0", "p1"))
ON_B0 = Adaptation("batch", "b0", ("p2", "p3"))
ON_B1 = Adaptation("batch", "b1", ("p2", "p3", "p0", "p1"))
AFTER_1 = Adaptation("plate", "p3", ("p2", "p3"), ON_1)
AFTER_2 = Adaptation("plate", "p0", ("p2", "p3", "p0"), AFTER_1)
AFTER_3 = Adaptation("plate", "p1", ("p2", "p3", "p0", "p1"), AFTER_2)
BY_HAND = {
    "none": [
        Turn(1, P1, None, ("p2",), ()),
        Turn(2, P2, None, ("p2", "p3"), ()),
        Turn(3, P3, None, ("p2", "p3", "p0"), ()),
        Turn(4, P4, None, ("p2", "p3", "p0", "p1"), ()),
    ],
    "plate": [
        Turn(1, P1, ON_1, ("p2",), (ON_1,)),
        Turn(2, P2, ON_2, ("p2", "p3"), (ON_2,)),
        Turn(3, P3, ON_3, ("p2", "p3", "p0"), (ON_3,)),
        Turn(4, P4, ON_4, ("p2", "p3", "p0", "p1"), (ON_4,)),
    ],
    "batch": [
        Turn(1, P1, ON_B0, ("p2", "p3"), ()),
        Turn(2, P2, ON_B0, ("p2", "p3"), (ON_B0,)),
        Turn(3, P3, ON_B1, ("p2", "p3", "p0", "p1"), ()),
        Turn(4, P4, ON_B1, ("p2", "p3", "p0", "p1"), (ON_B1,)),
    ],
    "continue": [
        Turn(1, P1, ON_1, ("p2",), (ON_1,)),
        Turn(2, P2, AFTER_1, ("p2", "p3"), (AFTER_1,)),
        Turn(3, P3, AFTER_2, ("p2", "p3", "p0"), (AFTER_2,)),
        Turn(4, P4, AFTER_3, ("p2", "p3", "p0", "p1"), (AFTER_3,)),
    ],
    "reuse": [
        Turn(1, P1, ON_1, ("p2",), (ON_1,)),
        Turn(2, P2, ON_1, ("p2", "p3"), ()),
        Turn(3, P3, ON_1, ("p2", "p3", "p0"), ()),
        Turn(4, P4, ON_1, ("p2", "p3", "p0", "p1"), ()),
    ],
}  # fmt: skip


@pytest.mark.parametrize("strategy", get_args(Strategy))
def test_turns_are_those_written_by_hand(strategy):
    assert turns_of(strategy, GIVEN) == BY_HAND[strategy]


@pytest.mark.parametrize("strategy", get_args(Strategy))
def test_no_model_knows_a_plate_that_has_not_arrived(strategy):
    plates = [PlateName("s", f"b{i // 3}", f"p{i:02d}") for i in range(10)]
    for turn in turns_of(strategy, plates):
        model = turn.model
        while model is not None:
            assert set(model.known) <= set(turn.known)
            model = model.start
        batch_is_there = {plate.plate for plate in plates if plate.batch <= turn.plate.batch}
        assert set(turn.known) <= (batch_is_there if strategy == "batch" else {p.plate for p in plates if p <= turn.plate})


@pytest.mark.parametrize("strategy", get_args(Strategy))
def test_every_model_is_charged_once_and_none_before_it_is_used(strategy):
    turns = turns_of(strategy, [PlateName("s", f"b{i // 3}", f"p{i:02d}") for i in range(10)])
    charged = [model for turn in turns for model in turn.charged]
    assert len(set(charged)) == len(charged)
    assert set(charged) == {turn.model for turn in turns} - {None}


def test_plates_wait_for_the_end_of_their_batch_alone():
    assert [turn.waits for turn in turns_of("batch", GIVEN)] == [1, 0, 1, 0]
    assert all(turn.waits == 0 for strategy in MEANING if strategy != "batch" for turn in turns_of(strategy, GIVEN))


def test_every_strategy_is_explained_and_takes_no_plates():
    assert list(MEANING) == list(get_args(Strategy))
    assert all(turns_of(strategy, []) == [] for strategy in MEANING)
