"""Spaces of sweeps: points, and what they make of a configuration."""

import numpy as np
import pytest

from coda_ray.config import ConfigError, Range, Tune
from coda_ray.pipeline.space import MOST_LISTED, config_at, corners, known_points, lengths, points_of
from synthetic import small_config

SPACE = {"granularity": ["source", "batch"], "adapt.lr": [1e-4, 1e-3, 1e-2]}


def test_a_grid_is_every_combination():
    points = points_of(Tune(space=SPACE, search="grid"))
    assert points == [{"granularity": g, "adapt.lr": lr} for g in ("source", "batch") for lr in (1e-4, 1e-3, 1e-2)]


def test_random_points_are_the_same_again_and_more_add_to_fewer():
    space = {"granularity": ["source", "batch"], "adapt.lr": Range(low=1e-5, high=1e-2, log=True)}
    space |= {"adapt.steps": Range(low=10, high=20, whole=True)}
    few, many = (points_of(Tune(space=space, samples=n, seed=3)) for n in (5, 200))
    assert many[:5] == few
    assert points_of(Tune(space=space, samples=5, seed=4)) != few
    rates = np.array([point["adapt.lr"] for point in many])
    assert rates.min() >= 1e-5
    assert rates.max() <= 1e-2
    assert 0.2 < (rates < np.sqrt(1e-5 * 1e-2)).mean() < 0.8  # even over orders of magnitude: half below 3e-4
    assert {point["adapt.steps"] for point in many} == set(range(10, 21))
    assert {point["granularity"] for point in many} == {"source", "batch"}


def test_points_of_optuna_are_known_where_they_are_few_combinations_of_lists():
    grid = points_of(Tune(space=SPACE, search="grid"))
    assert known_points(Tune(space=SPACE, search="optuna")) == known_points(Tune(space=SPACE, search="grid")) == grid
    ranges, many = {"adapt.lr": Range(low=1e-5, high=1e-2)}, {**SPACE, "adapt.steps": list(range(1, MOST_LISTED))}
    for space in (ranges, many):
        assert known_points(Tune(space=space, search="optuna")) == []
        assert len(known_points(Tune(space=space, search="random", samples=3))) == 3


def test_corners_reach_every_value():
    space = {**SPACE, "adapt.steps": Range(low=10, high=20, whole=True)}
    found = corners(Tune(space=space))
    assert found[0] == {"granularity": "source", "adapt.lr": 1e-4, "adapt.steps": 10}
    assert {p["adapt.lr"] for p in found} == {1e-4, 1e-3, 1e-2}
    assert {p["adapt.steps"] for p in found} == {10, 20}
    assert len(found) == 1 + 1 + 2 + 1


def test_lengths_reach_the_longest_adaptation_of_each_method():
    space = {**SPACE, "method": ["tent", "coda"], "adapt.steps": Range(low=10, high=20, whole=True), "tent.steps": [5, 30]}
    found = lengths(Tune(space=space))
    assert {(p["method"], p["adapt.steps"], p["tent.steps"]) for p in found} == {
        (method, steps, others) for method in ("tent", "coda") for steps in (10, 20) for others in (5, 30)
    }
    assert {(p["granularity"], p["adapt.lr"]) for p in found} == {("source", 1e-4)}


def test_a_point_changes_what_it_names(tmp_path):
    config = small_config(tmp_path)
    changed = config_at(
        config, {"adapt.lr": 0.5, "adapt.dino.ema_start": 0.9, "tent.lr": 0.1, "granularity": "plate", "method": "oda"}
    )
    assert changed.tent.lr == 0.1
    assert (changed.adapt.lr, changed.tune.granularity, changed.tune.method) == (0.5, "plate", "oda")
    assert (changed.dino.ema_start, changed.adapting.ema_start) == (config.dino.ema_start, 0.9)
    assert config_at(config, {}) == config


@pytest.mark.parametrize(
    ("point", "told"),
    [
        ({"adapt.rate": 1}, r"tune\.space\.adapt\.rate: there is no such field"),
        ({"lr": 1}, r"tune\.space\.lr: searched are method, granularity and fields of adapt, shot, tent"),
        ({"dino.ema_start": 0.9}, r"tune\.space\.dino\.ema_start: searched are"),
        ({"train.log_every": 5}, r"tune\.space\.train\.log_every: searched are"),
        ({"stream.tasks": 1}, r"tune\.space\.stream\.tasks: searched are"),
        ({"results.address": "elsewhere"}, r"tune\.space\.results\.address: searched are"),
        ({"tune.objective": "kbet"}, r"tune\.space\.tune\.objective: searched are"),
        ({"adapt.lr.x": 1}, r"tune\.space\.adapt\.lr\.x: there is no such field"),
        ({"adapt.lr": -1.0}, r"tune\.space: adapt\.lr: .*greater than 0 \(of \{'adapt\.lr': -1\.0\}\)"),
        ({"adapt.unit": "random"}, r"tune\.space\.adapt\.unit: trials on different units"),
        ({"granularity": "well"}, r"tune\.space: tune\.granularity: .*'source', 'batch' or 'plate'"),
    ],
)
def test_what_does_not_fit_is_told(tmp_path, point, told):
    with pytest.raises(ConfigError, match=told):
        config_at(small_config(tmp_path), point)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"space": {"adapt.lr": {"low": 1, "high": 1}}}, "low must be below high"),
        ({"space": {"adapt.lr": {"low": 0, "high": 1, "log": True}}}, "above 0 with log"),
        ({"space": {"adapt.lr": {"low": 1, "high": 2}}, "search": "grid"}, r"tune\.space\.adapt\.lr is a range"),
        ({"space": {"adapt.lr": []}}, r"tune\.space\.adapt\.lr is empty"),
        ({"stop_early": True}, "needs tune.score_every"),
        ({"pairs": [("a", "b"), ("a", "a")]}, r"tune\.pairs = .*'a' is adapted to itself"),
    ],
)
def test_a_space_that_cannot_be_searched_is_told(fields, told):
    with pytest.raises(ValueError, match=told):
        Tune.model_validate(fields)
