"""Random numbers by counter: draw k of sample i is a pure function of (seed, stream, i, k), whoever asks and when."""

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def uniforms(seed: int, counters: NDArray[np.int64], n: int, stream: int) -> NDArray[np.float64]:
    """Draw `n` uniform numbers for every counter.

    Parameters
    ----------
    seed
        Seed of the run.
    counters
        (N,) int64 sample numbers.
    n
        Numbers per counter.
    stream
        Separates uses of one seed (views, partners, ...).

    Returns
    -------
    ndarray
        (N, n) float64 in [0, 1).

    Notes
    -----
    The mixer is SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014), applied once per word of the key.
    """
    key = _mix(np.array([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64))
    key = _mix(key ^ np.uint64(stream))
    per_counter = _mix(key ^ np.asarray(counters).astype(np.uint64))
    bits = _mix(per_counter[:, None] + np.arange(n, dtype=np.uint64)[None, :])
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit words; integer overflow is the point."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))
