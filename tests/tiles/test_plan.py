import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coda_ray.tiles.plan import Partners, SamplePlan, share_of


def candidates(compounds, batches, row):
    """The obvious way: every tile of the same compound in another batch."""
    return {
        j for j in range(len(compounds)) if compounds[row] >= 0 and compounds[j] == compounds[row] and batches[j] != batches[row]
    }


@given(
    st.lists(st.tuples(st.integers(-1, 3), st.integers(0, 3)), min_size=1, max_size=40),
    st.floats(0, 1, exclude_max=True),
)
@settings(max_examples=300, deadline=None)
def test_partners_are_the_same_compound_in_another_batch(pairs, u):
    compounds, batches = (np.array(column, np.int64) for column in zip(*pairs, strict=True))
    partners = Partners.build(compounds, batches)
    rows = np.arange(len(compounds))
    drawn = partners.draw(rows, np.full(len(rows), u))
    for row in rows:
        expected = candidates(compounds, batches, row)
        assert partners.count(np.array([row]))[0] == len(expected)
        assert drawn[row] in expected if expected else drawn[row] == row


def test_every_candidate_is_drawn_equally_often():
    compounds = np.array([0] * 7 + [1] * 3)
    batches = np.array([0, 0, 1, 1, 2, 2, 2, 0, 1, 1])
    partners = Partners.build(compounds, batches)
    u = (np.arange(5000) + 0.5) / 5000
    drawn, counts = np.unique(partners.draw(np.zeros(5000, np.int64), u), return_counts=True)
    assert set(drawn) == {2, 3, 4, 5, 6}
    assert (counts == 1000).all()


def test_an_epoch_holds_every_anchor_once_in_an_order_of_its_own():
    anchors = np.array([5, 9, 2, 7, 30])
    plan = SamplePlan(1, anchors)
    first, second = (plan.rows(np.arange(e * 5, e * 5 + 5))[0] for e in (0, 1))
    assert sorted(first) == sorted(second) == sorted(anchors)
    orders = {tuple(plan.rows(np.arange(e * 5, e * 5 + 5))[0]) for e in range(20)}
    assert len(orders) > 10


def test_a_sample_is_a_pure_function_of_seed_and_number():
    rng = np.random.default_rng(0)
    partners = Partners.build(rng.integers(0, 5, 60), rng.integers(0, 3, 60))
    plan = SamplePlan(4, np.arange(60), partners)
    anchors, others = plan.rows(np.arange(500))
    assert others is not None
    picked = np.array([499, 3, 120, 61])
    again = SamplePlan(4, np.arange(60), partners).rows(picked)
    np.testing.assert_array_equal(again[0], anchors[picked])
    np.testing.assert_array_equal(again[1], others[picked])
    different = SamplePlan(5, np.arange(60), partners).rows(np.arange(500))
    assert (different[0] != anchors).any()


def test_without_shuffle_the_order_is_kept():
    np.testing.assert_array_equal(SamplePlan(0, np.arange(9), shuffle=False).rows(np.arange(9))[0], np.arange(9))


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_workers_split_a_minibatch_without_gap_or_overlap(world):
    shares = [share_of(rank, world, 17) for rank in range(world)]
    assert [n for low, high in shares for n in range(low, high)] == list(range(17))
    sizes = [high - low for low, high in shares]
    assert max(sizes) - min(sizes) <= 1
