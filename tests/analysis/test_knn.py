import math

import numpy as np
import pytest

from coda_ray.analysis import knn
from coda_ray.analysis.knn import knn_accuracy


def knn_by_loops(bank, bank_labels, queries, labels, k, temperature):
    """The same in plain loops and Python floats."""

    def cosine(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))

    right = 0
    for query, label in zip(queries.tolist(), labels, strict=True):
        near = sorted(((cosine(query, row), c) for row, c in zip(bank.tolist(), bank_labels, strict=True)), reverse=True)[:k]
        votes: dict[int, float] = {}
        for value, c in near:
            votes[c] = votes.get(c, 0.0) + math.exp(value / temperature)
        right += max(votes, key=lambda c: votes[c]) == label
    return right / len(labels)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (5, 0.1), (7, 1.0), (500, 0.07)])
def test_knn_equals_plain_loops(k, temperature, monkeypatch):
    monkeypatch.setattr(knn, "QUERIES_AT_A_TIME", 16)  # several chunks, the last one short
    rng = np.random.default_rng(k)
    centres = rng.normal(size=(4, 6))
    bank_labels, labels = rng.integers(0, 4, 60), rng.integers(0, 4, 41)
    bank = (centres[bank_labels] + rng.normal(size=(60, 6))) * rng.uniform(0.1, 9, (60, 1))
    queries = (centres[labels] + rng.normal(size=(41, 6))) * rng.uniform(0.1, 9, (41, 1))
    found = knn_accuracy(bank, bank_labels, queries, labels, k=k, temperature=temperature)
    assert found == knn_by_loops(bank, bank_labels, queries, labels, k, temperature)
    assert 0.3 < found < 1


def test_weights_let_one_close_neighbour_outvote_two_far_ones():
    bank = np.array([[1.0, 0.0], [0.5, 1.0], [0.5, -1.0]])
    args = (bank, np.array([1, 0, 0]), np.array([[1.0, 0.0]]), np.array([1]))
    assert knn_accuracy(*args, k=3, temperature=0.1) == 1.0
    assert knn_accuracy(*args, k=3, temperature=100.0) == 0.0


def test_low_temperatures_and_zero_rows_stay_finite():
    with np.errstate(all="raise", under="ignore"):
        bank = np.array([[1.0, 0.0], [0.0, 0.0]])
        assert knn_accuracy(bank, np.array([1, 0]), np.array([[2.0, 0.0]]), np.array([1]), temperature=1e-3) == 1.0


def test_wrong_arrays_are_refused():
    bank = np.ones((3, 2))
    with pytest.raises(ValueError, match="bank and queries"):
        knn_accuracy(bank, np.zeros(3, int), np.ones((0, 2)), np.zeros(0, int))
    with pytest.raises(ValueError, match=r"\(M, D\) with M"):
        knn_accuracy(bank, np.zeros(3, int), np.ones((4, 5)), np.zeros(4, int))
