import numpy as np
import pytest
from scipy.stats import binom

from coda_ray.analysis import intervals
from coda_ray.analysis.intervals import bootstrap_accuracy, paired_difference


def quantile(values, share):
    """Linear interpolation between order statistics."""
    values = sorted(values)
    place = share * (len(values) - 1)
    below = int(place)
    above = min(below + 1, len(values) - 1)
    return values[below] + (place - below) * (values[above] - values[below])


def resampled_accuracies(wells, correct, n, seed):
    """Draw wells by the same numbers, then go through their images one by one, seed by seed."""
    names = sorted(set(wells))
    times = np.random.default_rng(seed).multinomial(len(names), [1 / len(names)] * len(names), size=n)
    found = []
    for drawn in times:
        right = total = 0
        for name, often in zip(names, drawn, strict=True):
            for row in correct:
                for well, hit in zip(wells, row, strict=True):
                    if well == name:
                        right, total = right + int(often) * int(hit), total + int(often)
        found.append(right / total)
    return found


@pytest.fixture
def images(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES_AT_A_TIME", 16)  # several chunks, the last one short
    rng = np.random.default_rng(3)
    wells = rng.permutation(np.repeat([f"p/{i:02d}" for i in range(12)], rng.integers(1, 5, 12)))  # of unequal size
    return wells, rng.random((2, len(wells))) < 0.6, rng.random((3, len(wells))) < 0.4


def test_bounds_equal_plain_loops_over_the_same_draws(images):
    wells, several, other = images
    for correct in (several, several[:1]):
        means = resampled_accuracies(wells.tolist(), correct.tolist(), 50, seed=7)
        expected = (quantile(means, 0.05), quantile(means, 0.95))
        given = correct if len(correct) > 1 else correct[0]
        assert bootstrap_accuracy(wells, given, n=50, level=0.9, seed=7) == pytest.approx(expected, abs=1e-12)
    a = resampled_accuracies(wells.tolist(), several.tolist(), 50, seed=7)
    b = resampled_accuracies(wells.tolist(), other.tolist(), 50, seed=7)
    gaps = [x - y for x, y in zip(a, b, strict=True)]
    expected = (several.mean() - other.mean(), quantile(gaps, 0.05), quantile(gaps, 0.95))
    assert paired_difference(wells, several, other, n=50, level=0.9, seed=7) == pytest.approx(expected, abs=1e-12)


def test_images_that_follow_their_well_give_the_binomial_of_wells():
    right = np.arange(40) < 28
    wells, correct = np.repeat(np.arange(40), 9), np.repeat(right, 9)
    bounds = bootstrap_accuracy(wells, correct, n=20_000, seed=0)
    assert bounds == pytest.approx(binom.ppf([0.025, 0.975], 40, 0.7) / 40, abs=1.01 / 40)
    independent = bootstrap_accuracy(np.arange(360), correct, n=20_000, seed=0)
    assert bounds[1] - bounds[0] > 2.5 * (independent[1] - independent[0])  # 3 = √9 in the limit


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng, covered = np.random.default_rng(5), 0
    for trial in range(200):
        rate = rng.beta(2, 2, size=60)  # of each well; 0.5 in the mean
        correct = rng.random((60, 6)) < rate[:, None]
        low, high = bootstrap_accuracy(np.repeat(np.arange(60), 6), correct.ravel(), n=400, seed=trial)
        covered += low <= 0.5 <= high
    assert 0.90 <= covered / 200 <= 0.99


def test_a_difference_that_all_wells_share_has_no_spread():
    wells = np.repeat(np.arange(10), 4)
    correct_a, correct_b = np.tile([1, 1, 1, 0], 10), np.tile([1, 0, 1, 0], 10)
    assert paired_difference(wells, correct_a, correct_b, seed=0) == pytest.approx((0.25, 0.25, 0.25))
    assert paired_difference(wells, correct_b, correct_a, seed=0)[0] == pytest.approx(-0.25)


def test_wrong_input_is_refused():
    wells, correct = np.array(["a", "b", "b"]), np.array([1, 0, 1])
    with pytest.raises(ValueError, match=r"wells \(3,\) and correct \(2,\) must be"):
        bootstrap_accuracy(wells, correct[:2], seed=0)
    with pytest.raises(ValueError, match="correct_b holds values other"):
        paired_difference(wells, correct, np.array([0.5, 0, 1]), seed=0)
    with pytest.raises(ValueError, match="needs two wells or more, it has 1"):
        bootstrap_accuracy(np.array(["a", "a", "a"]), correct, seed=0)
    with pytest.raises(ValueError, match="n = 0"):
        bootstrap_accuracy(wells, correct, n=0, seed=0)
    with pytest.raises(ValueError, match=r"level = 95"):
        bootstrap_accuracy(wells, correct, level=95, seed=0)
