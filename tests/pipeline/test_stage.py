"""What a stage's key is made of, and what it stands on."""

import json

import pytest

from coda_ray.config import Adapt, Config, Views
from coda_ray.pipeline.stage import RECIPES, Stage, check_made_of, settings_of
from coda_ray.storage import open_place
from coda_ray.training.checkpoints import DamagedFileError
from synthetic import place

# Keys leave defaults out. Whoever changes one of these raises the kind's recipe, then copies it here; new options need neither.
OPTIMISATION = {
    "steps": "300 epochs", "minibatch": 128, "lr": 1e-4, "lr_start": 1e-8, "lr_end": 1e-6, "warmup": "10 epochs",
    "weight_decay": 1e-5, "weight_decay_end": 1e-4, "betas": [0.9, 0.999], "eps": 1e-8, "clip": 1.0,
}  # fmt: skip
DEFAULTS = {
    "model": {
        "arch": "deit_small_patch16_224", "patch": 8, "width": 128, "depth": 4, "heads": 4, "init": "imagenet",
    },
    "views": {
        "tile_crop": 448, "size_global": 224, "size_local": 96, "locals_per_sample": 6, "flip_probability": 0.5,
        "jitter_probability": 0.5, "jitter_std": 0.005,
    },
    "dino": {
        "head_hidden": 2048, "head_bottleneck": 256, "out_dim": 4096, "student_temperature": 0.1, "teacher_temperature": 0.07,
        "teacher_temperature_start": 0.04, "teacher_temperature_ramp": "30 epochs", "centering": "mean", "centre_momentum": 0.9,
        "koleo_weight": 0.0, "ema_start": 0.996, "ema_end": 1.0, "drop_path": 0.1, "freeze_last_layer": "1 epochs",
        "collapse": "warn", "collapse_floor": 0.6, "collapse_ceiling": 0.999, "collapse_patience": 10,
    },
    "pretrain": OPTIMISATION,
    "classify": {
        **OPTIMISATION, "steps": "50 epochs", "warmup": "3 epochs", "lr_end": 1e-4, "weight_decay_end": 1e-5, "select": "best",
        "validate_every": 200, "drop_path": 0.0,
    },
    "adapt": {**OPTIMISATION, "minibatch_unit": None, "no_partner": "error", "partner_pool": "source"},
}  # fmt: skip


def test_a_default_that_changes_raises_the_version_of_the_keys():
    now = Config().model_dump(mode="json")
    assert dict.fromkeys(RECIPES, 2) == RECIPES
    assert {name: {field: now[name].get(field) for field in fields} for name, fields in DEFAULTS.items()} == DEFAULTS


def test_a_key_holds_what_differs_from_the_defaults():
    assert settings_of(Views()) == {}
    assert settings_of(Views(size_local=64, size_global=224)) == {"size_local": 64}
    assert settings_of(Adapt(minibatch_unit=8, lr=3e-4), exclude={"minibatch_unit"}) == {"lr": 3e-4}


def plain(kind, *needs):
    return Stage(kind, f"the {kind}", {}, lambda folder, report: pytest.fail("nothing runs here"), needs)


@pytest.mark.parametrize("told", [{}, {"made_of": {}}], ids=["of an older release", "no weights below"])
def test_a_stage_that_does_not_tell_what_it_was_made_of_passes(tmp_path, told):
    results, below = open_place(place(tmp_path)), plain("pretrain")
    above = plain("classify", below)
    results.write(f"{below.path}/done.json", json.dumps({"sha256": "b" * 64}).encode())
    results.write(f"{above.path}/stage.json", json.dumps(told).encode())
    check_made_of([above], results)


def test_weights_that_are_not_those_that_a_stage_was_made_of_are_told_from_far_above(tmp_path):
    results, below = open_place(place(tmp_path)), plain("pretrain")
    middle = plain("classify", below)
    above = plain("evaluate", middle)
    results.write(f"{middle.path}/stage.json", json.dumps({"made_of": {below.path: "a" * 64}}).encode())
    check_made_of([above], results)  # nothing is there to compare with
    results.write(f"{below.path}/done.json", json.dumps({"sha256": "a" * 64}).encode())
    check_made_of([above], results)
    results.write(f"{below.path}/done.json", json.dumps({"sha256": "b" * 64}).encode())
    told = f"{middle.path}: the classify was made of the the pretrain with SHA-256 aaaaaaaaaaaa..., but .*{below.path} has bbbbbb"
    with pytest.raises(DamagedFileError, match=told):
        check_made_of([above], results)
