"""Bootstrap intervals of accuracies, with wells as the unit that is resampled.

Images of a well share its cells, its compound and its place on the plate; resampling images one by one would take them for
independent and give intervals that are too narrow.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES_AT_A_TIME = 256


def bootstrap_accuracy(
    wells: NDArray[Any], correct: NDArray[Any], *, n: int = 2000, level: float = 0.95, seed: int
) -> tuple[float, float]:
    """Interval of the accuracy per image when whole wells are drawn anew.

    The percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13) over clusters
    (Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8, wells with replacement, images as
    they are).

    Parameters
    ----------
    wells
        (N,) strings or integers that name the well of each image across all plates, such as `plate/A01`.
    correct
        (N,) or (S, N) booleans or 0 and 1: whether the image was classified rightly; one row per seed of the same images.
        Seeds are averaged within a resample: the interval tells how the mean over seeds varies with the wells, not how a
        single seed varies.
    n
        Resamples.
    level
        Share of the resamples inside the interval.
    seed
        Of the resamples; the same seed and wells draw the same wells.

    Returns
    -------
    tuple of float
        Lower and upper bound, in [0, 1].

    Raises
    ------
    ValueError
        When shapes disagree, there are fewer than two wells, `correct` holds other values than 0 and 1, or `n` or `level`
        is out of range.
    """
    low, high = _interval(_resampled_means(wells, _mean_over_seeds(wells, correct, "correct"), n, seed), level)
    return low, high


def paired_difference(
    wells: NDArray[Any], correct_a: NDArray[Any], correct_b: NDArray[Any], *, n: int = 2000, level: float = 0.95, seed: int
) -> tuple[float, float, float]:
    """Difference of two accuracies on the same images, with its interval when the same wells are drawn for both.

    Parameters
    ----------
    wells
        (N,) names as in `bootstrap_accuracy`.
    correct_a, correct_b
        (N,) or (S, N) as in `bootstrap_accuracy`; the two may have different numbers of seeds.
    n, level, seed
        As in `bootstrap_accuracy`.

    Returns
    -------
    tuple of float
        Accuracy of a minus accuracy of b, and the lower and upper bound of the difference, in [-1, 1].

    Raises
    ------
    ValueError
        As `bootstrap_accuracy`.
    """
    difference = _mean_over_seeds(wells, correct_a, "correct_a") - _mean_over_seeds(wells, correct_b, "correct_b")
    low, high = _interval(_resampled_means(wells, difference, n, seed), level)
    return float(difference.mean()), low, high


def _mean_over_seeds(wells: NDArray[Any], correct: NDArray[Any], name: str) -> NDArray[np.float64]:
    """Share of seeds that were right, per image: (N,)."""
    wells, right = np.asarray(wells), np.atleast_2d(np.asarray(correct))
    if wells.ndim != 1 or right.ndim != 2 or right.shape[1] != len(wells) or not len(right):
        raise ValueError(f"wells {wells.shape} and {name} {np.shape(correct)} must be (N,) and (N,) or (S, N)")
    if not np.isin(right, (0, 1)).all():
        raise ValueError(f"{name} holds values other than 0 and 1; give predicted == labels")
    mean: NDArray[np.float64] = right.mean(axis=0, dtype=np.float64)
    return mean


def _resampled_means(wells: NDArray[Any], values: NDArray[np.float64], n: int, seed: int) -> NDArray[np.float64]:
    """Mean over the images of each of n draws of as many wells as there are, with replacement: (n,)."""
    names, code = np.unique(wells, return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"a bootstrap needs two wells or more, it has {len(names)}; give the wells of several compounds")
    if n < 1:
        raise ValueError(f"n = {n}: give the number of resamples, 1 or more")
    sums, sizes = np.bincount(code, weights=values), np.bincount(code).astype(np.float64)
    rng, means = np.random.default_rng(seed), []
    # How often each well was drawn says all about a draw. Chunks bound the memory and change no draw.
    for start in range(0, n, RESAMPLES_AT_A_TIME):
        size = min(RESAMPLES_AT_A_TIME, n - start)
        times = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=size).astype(np.float64)
        means.append((times @ sums) / (times @ sizes))
    return np.concatenate(means)


def _interval(resampled: NDArray[np.float64], level: float) -> tuple[float, float]:
    """Percentiles that leave the same share out on both sides."""
    if not 0 < level < 1:
        raise ValueError(f"level = {level}: give a share between 0 and 1, such as 0.95")
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
