"""Schedules as pure functions of the step, so that a resumed run continues them exactly."""

import math
from dataclasses import dataclass

# Of torch.optim.lr_scheduler.ReduceLROnPlateau.
PLATEAU_THRESHOLD = 1e-4


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


@dataclass
class Plateau:
    """Lower the learning rate by ten whenever a validation loss and an accuracy both stand still.

    What torch's ReduceLROnPlateau does by one score, with its threshold: relative, 1e-4.

    Parameters
    ----------
    patience
        How many validations in a row may pass without a better loss or accuracy; the next such one lowers the rate.
    share
        Of the learning rate that is used now.
    stale
        Validations since the last better score, or since the rate was lowered.
    loss, accuracy
        The best so far; None before the first validation.
    """

    patience: int
    share: float = 1.0
    stale: int = 0
    loss: float | None = None
    accuracy: float | None = None

    def watch(self, loss: float, accuracy: float) -> None:
        """Take the scores of a validation."""
        lower = self.loss is None or loss < self.loss * (1 - PLATEAU_THRESHOLD)
        higher = self.accuracy is None or accuracy > self.accuracy * (1 + PLATEAU_THRESHOLD)
        if lower:
            self.loss = loss
        if higher:
            self.accuracy = accuracy
        self.stale = 0 if lower or higher else self.stale + 1
        if self.stale > self.patience:
            self.share, self.stale = self.share / 10, 0
