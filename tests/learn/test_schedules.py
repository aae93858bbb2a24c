"""Schedules against tables built element by element, as training scripts build them."""

import numpy as np
import pytest

from coda_ray.learn.schedules import cosine, linear_then_constant, warmup_cosine


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
