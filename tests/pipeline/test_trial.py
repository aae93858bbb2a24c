"""Trials of a sweep as they are planned, without a Ray."""

from dataclasses import replace

import pytest

from coda_ray.pipeline import data
from coda_ray.pipeline.trial import Trial
from coda_ray.storage import open_place
from coda_ray.tiles.store import COMPOUND
from synthetic import small_config, write_tiles


def trial(root, point, unit="all"):
    config = small_config(root, tune={"pairs": [("a", "b")], "space": {}}, adapt={"unit": unit})
    for source in ("a", "b"):
        write_tiles(config, source, plates_per_batch=2)
    return Trial.at(config, "sweep", {"adapt.lr": 1e-3, **point})


@pytest.mark.parametrize(
    ("unit", "granularity", "images"), [("all", "source", 56), ("all", "batch", 56), ("b1", "batch", 28), ("random", "plate", 14)]
)
def test_the_unadapted_model_is_scored_on_the_tiles_that_the_trials_are_scored_on(tmp_path, unit, granularity, images):
    (cell,) = trial(tmp_path, {"granularity": granularity}, unit).cells
    assert len(cell.seen) == images
    assert cell.before.inputs["tiles"] == cell.after(None)[1].inputs["tiles"] == cell.seen.without_labels().fingerprint


@pytest.mark.parametrize(("split", "hidden"), [("plate", False), ("compounds", True), ("new-compounds", False)])
def test_criteria_see_no_compound_that_is_held_out_of_the_adaptation(tmp_path, split, hidden):
    (cell,) = trial(tmp_path, {}).cells
    config = cell.config.model_copy(update={"split": split})
    cell = replace(cell, config=config, request=replace(cell.request, split=split))
    held = data.held_out_compounds(config.model_copy(update={"split": "compounds"}), "a")
    measured = cell.seen.where(~cell.seen.frame[COMPOUND].isin(held)) if hidden else cell.seen
    assert cell.before.inputs["tiles"] == cell.after(None)[1].inputs["tiles"] == measured.without_labels().fingerprint
    # The oracle is scored on them all the same.
    assert set(cell.labelled.frame[COMPOUND]) >= set(held)


def test_checkpoints_of_every_unit_are_dropped_and_nothing_else(tmp_path):
    (cell,) = trial(tmp_path, {"granularity": "batch"}).cells
    results = open_place(cell.config.results)
    folders = [cell._trained(unit, None).path for unit in ("b0", "b1")]
    for folder in folders:
        results.write(f"{folder}/done.json", b"{}")
        results.write(f"{folder}/checkpoints/step-00000002/state.json", b"{}")
    cell.drop_checkpoints(results)
    assert [results.names(folder) for folder in folders] == [["done.json"]] * 2
