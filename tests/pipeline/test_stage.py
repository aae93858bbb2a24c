"""What a stage's key is made of."""

from coda_ray.config import Adapt, Config, Views
from coda_ray.pipeline.stage import RECIPE_VERSION, settings_of

# Keys leave defaults out. Whoever changes one of these raises RECIPE_VERSION, and then copies it here; new options need neither.
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
        "collapse": "warn", "collapse_floor": 0.02, "collapse_ceiling": 0.999, "collapse_patience": 10,
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
    assert RECIPE_VERSION == 2
    assert {name: {field: now[name].get(field) for field in fields} for name, fields in DEFAULTS.items()} == DEFAULTS


def test_a_key_holds_what_differs_from_the_defaults():
    assert settings_of(Views()) == {}
    assert settings_of(Views(size_local=64, size_global=224)) == {"size_local": 64}
    assert settings_of(Adapt(minibatch_unit=8, lr=3e-4), exclude={"minibatch_unit"}) == {"lr": 3e-4}
