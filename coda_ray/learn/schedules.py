"""Schedules as pure functions of the step, so that a resumed run continues them exactly."""

import math


def warmup_cosine(step: int, total: int, warmup: int, start: float, peak: float, end: float) -> float:
    """Rise in a line from `start` to `peak`, then follow half a cosine to `end` (SGDR, ICLR 2017).

    Parameters
    ----------
    step
        Optimisation step, from 0; beyond `total` the value stays at `end`.
    total, warmup
        Length of the whole schedule and of its linear part, in steps.
    start, peak, end
        Values at step 0, at step `warmup` and at step `total`.

    Returns
    -------
    float
        The value at `step`.
    """
    if step < warmup:
        return start + (peak - start) * step / warmup
    return cosine(step - warmup, total - warmup, peak, end)


def cosine(step: int, total: int, start: float, end: float) -> float:
    """Go from `start` at step 0 to `end` at step `total` along half a cosine, and stay there."""
    if step >= total:
        return end
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * step / total))


def linear_then_constant(step: int, ramp: int, start: float, end: float) -> float:
    """Go from `start` at step 0 to `end` at step `ramp` in a line, and stay there."""
    if step >= ramp:
        return end
    return start + (end - start) * step / ramp
