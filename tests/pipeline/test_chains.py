"""Adaptations that go on from adaptations: their keys, their first weights, and what is read from them."""

import json
from dataclasses import replace

import pytest
import torch

from coda_ray.pipeline import data
from coda_ray.pipeline.criteria import criteria
from coda_ray.pipeline.evaluate import evaluate
from coda_ray.pipeline.methods.continued import adapt
from coda_ray.pipeline.methods.tent import tent
from coda_ray.pipeline.models import choose, export_of, find_model, stored_models
from coda_ray.pipeline.request import Model
from coda_ray.pipeline.train_stages import (
    classify,
    extractor_of,
    lineage,
    load_model,
    objective_of,
    pretrain,
    root_of,
    stage_tensors,
)
from coda_ray.storage import open_place
from synthetic import finish, model_on, small_config, write_tiles


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = small_config(tmp_path_factory.mktemp("chains"))
    for source in ("a", "b"):
        write_tiles(config, source, batches=2, plates_per_batch=2)
    return config


def chain(config, pretrained, plates, seed=0):
    """Plan adaptations, each from the one before."""
    found = []
    for plate in plates:
        start = found[-1] if found else None
        found.append(adapt(config, model_on(pretrained), "b", granularity="plate", unit=plate, seed=seed, start=start))
    return found


@pytest.fixture(scope="module", params=["dino-cb", "mae"])
def finished(config, request):
    """A pre-training, the classifier on it, and a chain of three, with random weights."""
    pretrained = pretrain(config, "a", objective=request.param, seed=0)
    classifier = classify(config, "a", seed=0, extractor=pretrained)
    adapted = chain(config, pretrained, ["bb0p0", "bb0p1", "bb1p0"])
    finish(config, [pretrained, classifier, *adapted])
    results = open_place(config.results)
    job = {"key": request.param, "config": config.model_dump(mode="json"), "transfers": []}
    job["stages"] = [stage.path for stage in (pretrained, classifier, *adapted)]
    results.write(f"jobs/{request.param}.json", json.dumps(job).encode())
    return pretrained, classifier, adapted


def test_keys_without_a_start_are_those_of_earlier_releases(config):
    def of_the_same_tiles(stage, *needs):
        return replace(stage, inputs={**stage.inputs, "tiles": "tiles"}, needs=needs)

    pretrained = pretrain(config, "a", objective="dino-cb", seed=0)
    adapted = adapt(config, model_on(pretrained), "b", granularity="plate", unit="bb0p0", seed=1)
    below = of_the_same_tiles(pretrained)
    assert (below.key, of_the_same_tiles(adapted, below).key) == ("0c5091327444bed9", "68d1ef87bb6d47d7")
    assert adapted.needs == (pretrained,)


def test_a_start_is_part_of_the_key_and_of_the_title(config):
    pretrained = pretrain(config, "a", objective="dino-cb", seed=0)
    first, second, third = chain(config, pretrained, ["bb0p0", "bb0p1", "bb1p0"])
    direct = adapt(config, model_on(pretrained), "b", granularity="plate", unit="bb1p0", seed=0)
    other = chain(config, pretrained, ["bb1p1", "bb1p0"])[-1]
    assert len({third.key, direct.key, other.key}) == 3
    assert third.inputs == direct.inputs
    assert third.title == "adapt coda a to b plate bb1p0, after plate bb0p1, seed 0"
    assert lineage(third) == [pretrained, first, second, third]


def test_a_start_on_another_model_is_refused(config):
    pretrained, other = (pretrain(config, "a", objective="dino-cb", seed=seed) for seed in (0, 1))
    with pytest.raises(ValueError, match=r"it adapts another model than pretrain dino-cb on a, seed 1"):
        adapt(
            config, model_on(other), "b", granularity="plate", unit="bb0p1", seed=0, start=chain(config, pretrained, ["bb0p0"])[0]
        )
    model = Model("dual-cb", classify(config, "a", seed=0, extractor=pretrained), pretrained)
    whole = tent(config, model, "b", granularity="plate", unit="bb0p0", seed=0)
    with pytest.raises(ValueError, match=r"adapt tent .*: it adapts another model"):
        adapt(config, model_on(pretrained), "b", granularity="plate", unit="bb0p1", seed=0, start=whole)
    with pytest.raises(ValueError, match="tent starts from a model of the source alone"):
        tent(config, model, "b", granularity="plate", unit="bb0p1", seed=0, start=whole)


def test_training_begins_with_the_whole_state_of_the_start(config, finished):
    pretrained, _, (first, second, _) = finished
    _, run = second.make(open_place(config.results).child(second.path), None)
    began, left, root = run.build().objective.state_dict(), stage_tensors(config, first), stage_tensors(config, pretrained)
    kept = {name: value for name, value in left.items() if not name.endswith("centre")}
    assert any(name.startswith(("student.", "encoder.")) for name in kept)
    assert all(torch.equal(began[name], value) for name, value in kept.items())
    assert not all(torch.equal(began[name], root[name]) for name in kept)


def test_models_of_a_chain_are_found_under_the_classifier_of_its_pre_training(config, finished):
    pretrained, classifier, adapted = finished
    results, method = open_place(config.results), {"dino-cb": "coda", "mae": "oda-mae"}[pretrained.inputs["objective"]]
    stored = choose(stored_models(results), results, method=method, unit="bb1p0")
    assert (stored.classifier.key, stored.adapted.key) == (classifier.key, adapted[-1].key)
    assert [stage.key for stage in stored.stages] == [stage.key for stage in (pretrained, classifier, *adapted)]
    assert objective_of(stored.adapted) == pretrained.inputs["objective"]
    assert root_of(stored.adapted).key == pretrained.key
    export = export_of(config, stored)
    assert [part["stage"].split("/")[0] for part in export.model.description["trained_on"]] == [
        "pretrain", "classify", "adapt", "adapt", "adapt",
    ]  # fmt: skip
    assert find_model(config, results.address(adapted[-1].path)).key == export.model.key


def test_a_chains_last_extractor_is_under_the_frozen_classifier(config, finished):
    _, classifier, adapted = finished
    model = load_model(config, classifier, adapted[-1], 2)
    expected, own = extractor_of(config, adapted[-1]), model.extractor.state_dict()
    assert expected.keys() == own.keys()
    assert all(torch.equal(own[name], expected[name]) for name in own)


def test_criteria_of_a_chain_take_the_objective_of_its_pre_training(config, finished):
    pretrained, classifier, adapted = finished
    index = data.load_tiles(config, "b")
    before, after = (evaluate(config, index, "b", classifier, stage) for stage in (None, adapted[-1]))
    section = "mae" if pretrained.inputs["objective"] == "mae" else "dino"
    assert section in criteria(config, index, after, (adapted[-1],), before).inputs
