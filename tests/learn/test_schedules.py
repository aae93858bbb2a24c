"""Schedules against tables built element by element, as training scripts build them."""

from typing import Literal

import numpy as np
import pytest
import torch

from coda_ray.learn.schedules import Plateau, cosine, linear_then_constant, warmup_cosine


def test_warmup_cosine_equals_a_precomputed_table() -> None:
    total, warmup, start, peak, end = 100, 12, 1e-8, 1e-4, 1e-6
    rise = np.linspace(start, peak, warmup, endpoint=False)
    fall = end + 0.5 * (peak - end) * (1 + np.cos(np.pi * np.arange(total - warmup) / (total - warmup)))
    ours = [warmup_cosine(step, total, warmup, start, peak, end) for step in range(total)]
    np.testing.assert_allclose(ours, np.concatenate([rise, fall]), rtol=1e-12)
    assert ours[warmup] == peak
    assert warmup_cosine(total, total, warmup, start, peak, end) == end
    assert warmup_cosine(total + 7, total, warmup, start, peak, end) == end


def test_a_run_shorter_than_its_warm_up_only_rises() -> None:
    values = [warmup_cosine(step, 5, 10, 0.0, 1.0, 0.5) for step in range(5)]
    np.testing.assert_allclose(values, [0, 0.1, 0.2, 0.3, 0.4], atol=1e-15)


def test_equal_peak_and_end_stay_constant_after_the_warm_up() -> None:
    assert {warmup_cosine(step, 50, 3, 1e-8, 1e-4, 1e-4) for step in range(3, 60)} == {1e-4}


def test_cosine_is_point_symmetric_about_its_middle() -> None:
    values = np.array([cosine(step, 40, 0.996, 1.0) for step in range(41)])
    assert values[0] == 0.996
    assert values[-1] == 1.0
    np.testing.assert_allclose(values + values[::-1], 1.996, rtol=1e-12)
    assert (np.diff(values) > 0).all()


def test_linear_then_constant() -> None:
    values = [linear_then_constant(step, 4, 0.04, 0.08) for step in range(7)]
    np.testing.assert_allclose(values, [0.04, 0.05, 0.06, 0.07, 0.08, 0.08, 0.08])


@pytest.mark.parametrize("schedule", [cosine, linear_then_constant])
def test_a_ramp_of_no_steps_is_at_its_end(schedule: object) -> None:
    assert callable(schedule)
    assert schedule(0, 0, 0.04, 0.07) == 0.07


def _rates_of_torch(scores: list[float], mode: Literal["min", "max"], patience: int) -> list[float]:
    """The share of the learning rate after each score, by torch's own schedule."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode, factor=0.1, patience=patience, eps=0)
    rates = []
    for score in scores:
        schedule.step(score)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize("patience", [0, 2])
@pytest.mark.parametrize("which", ["loss", "accuracy"])
def test_plateau_is_torchs_where_the_other_score_stands_still(which: str, patience: int) -> None:
    rng = np.random.default_rng(patience)
    # Better by less than the threshold, too.
    scores = (0.5 + rng.choice([-0.1, 0.0, 2e-5, 0.1], 60).cumsum().clip(-0.4, 0.4)).tolist()
    plateau, shares = Plateau(patience), []
    for score in scores:
        plateau.watch(*((score, 0.3) if which == "loss" else (0.3, score)))
        shares.append(plateau.share)
    expected = _rates_of_torch(scores, "min" if which == "loss" else "max", patience)
    np.testing.assert_allclose(shares, expected, rtol=1e-9)
    assert len(set(shares)) > 3


def test_a_better_loss_or_a_better_accuracy_keeps_the_rate() -> None:
    plateau = Plateau(1)
    for step in range(10):
        plateau.watch(1.0 - 0.1 * (step // 2), 0.1 + 0.1 * ((step + 1) // 2))  # in turn
    assert plateau.share == 1.0
    for _ in range(2):
        plateau.watch(0.6, 0.6)
    assert plateau.share == 0.1
