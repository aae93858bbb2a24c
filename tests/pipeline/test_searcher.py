"""Optuna's choice of points, asked as Ray Tune asks it, without a Ray."""

import pytest
from optuna.trial import TrialState
from ray.tune.search import Searcher

from coda_ray.config import Range
from coda_ray.pipeline.searcher import OptunaSearcher
from coda_ray.pipeline.trial import Trial
from synthetic import small_config, write_tiles

SPACE = {"method": ["coda", "tent"], "tent.lr": [1e-3, 1e-2]}


@pytest.fixture
def world(tmp_path):
    """Settings of a sweep, with a space that may be another."""

    def made(space):
        return small_config(tmp_path, tune={"pairs": [("a", "b")], "search": "optuna", "space": space})

    for source in ("a", "b"):
        write_tiles(made(SPACE), source, plates_per_batch=2)
    return made


def record(config, point, status, score=None, **more):
    return {"key": Trial.at(config, "", point).key, "point": point, "status": status, "score": score, **more}


def asked(searcher):
    """Every point that it suggests, each trial of which ends at once."""
    found = []
    while (suggestion := searcher.suggest(str(len(found)))) != Searcher.FINISHED:
        searcher.on_trial_complete(str(len(found)), {"score": 0.5, "step": 4})
        found.append(suggestion["point"])
    return found


def test_a_space_of_lists_is_asked_for_to_its_end_and_each_trial_once(world):
    config = world(SPACE)
    searcher = OptunaSearcher(config, "", [], "max")
    found = asked(searcher)
    # CODA reads no field of tent.
    assert sorted(point["tent.lr"] for point in found if point["method"] == "tent") == [1e-3, 1e-2]
    assert [point["method"] for point in found].count("coda") == 1
    assert len(searcher.listed) == len(searcher.trials) == 3
    assert searcher.exhausted


def test_values_that_do_not_go_together_are_a_trial_that_fails_not_the_end_of_the_search(world):
    config = world({"granularity": ["source", "plate"], "adapt.partner_pool": ["source", "unit"]})
    searcher = OptunaSearcher(config, "", [], "max")
    assert {tuple(point.values()) for point in asked(searcher)} == {
        (granularity, pool) for granularity in ("source", "plate") for pool in ("source", "unit")
    }


def test_a_range_that_no_method_reads_ends_the_search(world):
    config = world({"tent.lr": Range(low=1e-4, high=1e-2, log=True)})
    searcher = OptunaSearcher(config, "", [], "max")
    assert len(asked(searcher)) == 1
    assert searcher.exhausted


def test_what_failed_or_was_interrupted_is_asked_for_first(world):
    config = world({"adapt.lr": Range(low=1e-4, high=1e-2, log=True)})
    records = [record(config, {"adapt.lr": rate}, status) for rate, status in ((2e-4, "failed"), (7e-3, "running"))]
    searcher = OptunaSearcher(config, "", records, "max")
    assert [searcher.suggest(name)["point"]["adapt.lr"] for name in ("1", "2")] == [2e-4, 7e-3]
    assert searcher.suggest("3")["point"]["adapt.lr"] not in (2e-4, 7e-3)


def test_optuna_knows_what_earlier_drivers_found_and_is_not_asked_for_it_again(world):
    config = world({"adapt.lr": [1e-4, 1e-3, 1e-2]})
    curve = [{"step": 2, "score": 0.1}]
    records = [
        record(config, {"adapt.lr": 1e-3}, "finished", 0.7, curve=[*curve, {"step": 4, "score": 0.7}]),
        record(config, {"adapt.lr": 1e-4}, "stopped", 0.1, curve=curve),
    ]
    searcher = OptunaSearcher(config, "", records, "max")
    finished, stopped = searcher._study.trials
    assert (finished.state, finished.value, finished.params) == (TrialState.COMPLETE, 0.7, {"adapt.lr": 1e-3})
    assert (stopped.state, stopped.intermediate_values) == (TrialState.PRUNED, {2: 0.1})
    assert asked(searcher) == [{"adapt.lr": 1e-2}]


def test_ends_are_told_as_what_they_are(world):
    searcher = OptunaSearcher(world({"adapt.lr": Range(low=1e-4, high=1e-2)}), "", [], "min")
    for name, result, error in (
        ("1", {"score": 0.3, "step": 4}, False),
        ("2", {"score": 0.4, "step": 2}, False),
        ("3", None, True),
    ):
        searcher.suggest(name)
        if result:
            searcher.on_trial_result(name, result)
        searcher.on_trial_complete(name, result, error)
    states = [trial.state for trial in searcher._study.trials]
    assert states == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]
    assert searcher._study.best_value == 0.3
