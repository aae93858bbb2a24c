"""A small tile store without images behind it: gratings whose period is the MoA, gain and offset by source and batch."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from coda_ray.config import Config, Place
from coda_ray.jump.prepare import preparation_of
from coda_ray.jump.tables import CONTROL
from coda_ray.storage import open_place
from coda_ray.tiles.store import COMPOUND, LABEL, TileStore

MOAS = 3
COMPOUNDS = 2
SIDE = 32


def small_config(root: Path, **sections: object) -> Config:
    """A configuration that trains in seconds, everything under `root`."""
    steps = {"steps": 4, "minibatch": 8, "lr": 1e-3, "lr_end": 1e-4, "warmup": 1}
    values: dict[str, object] = {
        "tiles": {"address": str(root / "tiles")},
        "results": {"address": str(root / "results")},
        "bucket": {"address": str(root / "bucket")},
        "metadata": {"address": str(root / "bucket" / "metadata")},
        "ingest": {"channels": ["DNA", "ER"]},
        "stream": {"rows_per_task": 16, "tasks": 1},
        "model": {"arch": "vit", "patch": 8, "width": 16, "depth": 2, "heads": 2, "init": "random"},
        "views": {"tile_crop": SIDE, "size_global": 24, "size_local": 16, "locals_per_sample": 2},
        "dino": {
            "head_hidden": 16, "head_bottleneck": 8, "out_dim": 16, "teacher_temperature_ramp": 2, "freeze_last_layer": 1,
        },
        "mae": {"decoder_width": 8, "decoder_depth": 1, "decoder_heads": 2},
        "ttt": {"steps": 2, "masks": 4, "images_at_once": 4},
        "tent": {"steps": 2, "minibatch": 8},
        "pretrain": steps,
        "classify": {**steps, "lr_end": 1e-3, "validate_every": 2},
        "adapt": steps,
        "evaluate": {"minibatch": 16, "profiles": False},
        "train": {"checkpoint_every": 2, "log_every": 1, "cpus_per_worker": 1, "precision": "fp32"},
        "tracking": {"enabled": False},
    }  # fmt: skip
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section  # type: ignore[dict-item]
    return Config.model_validate(values)


def write_tiles(
    config: Config, source: str, *, batches: int = 2, plates_per_batch: int = 1, seed: int = 0, plates_of: str | None = None
) -> TileStore:
    """Write the tiles of one source: every compound once per plate with two sites, and a DMSO well.

    Plates are named after the source, or after another (`plates_of`), so that two have plates of the same names.
    """
    rng = np.random.default_rng([seed, sum(map(ord, source))])
    store = TileStore.open(open_place(config.tiles), preparation_of(config))
    phase = np.arange(SIDE)[None, :] * 2 * np.pi
    for batch in range(batches):
        gain, offset = rng.uniform(40, 90), rng.uniform(80, 140)
        for number in range(plates_per_batch):
            plate = f"{plates_of or source}b{batch}p{number}"
            path = store.plate_path(source, f"b{batch}", plate)
            tiles, rows = [], []
            wells = [(m, c) for m in range(MOAS) for c in range(COMPOUNDS)] + [(None, None)]
            for well, (moa, compound) in enumerate(wells):
                for site in range(2):
                    wave = np.zeros((SIDE, SIDE)) if moa is None else np.sin(phase / (4 + 4 * moa)) + 0 * phase.T
                    noise = rng.normal(0, 0.3, (2, SIDE, SIDE))
                    tiles.append(np.clip(offset + gain * (wave[None] + noise), 0, 255).astype(np.uint8))
                    rows.append(
                        {
                            "Metadata_Source": source, "Metadata_Batch": f"b{batch}", "Metadata_Plate": plate,
                            "Metadata_Well": f"A{well:02d}", "Metadata_Site": str(site),
                            COMPOUND: "DMSO" if moa is None else f"c{moa}{compound}",
                            CONTROL: "negcon" if moa is None else None,
                            LABEL: None if moa is None else f"moa {moa}",
                        }
                    )  # fmt: skip
            index = pd.concat([store.write_shard(path, 0, np.stack(tiles)), pd.DataFrame(rows)], axis=1)
            store.finish_plate(path, index, pd.DataFrame(), {})
    return store


def finish(config: Config, stages: Sequence[object]) -> None:
    """Leave what finished training stages leave, with random weights and no training; each comes after those it needs."""
    import torch

    from coda_ray.learn.dual import DualModel
    from coda_ray.pipeline import networks
    from coda_ray.pipeline.moments import SUMS
    from coda_ray.pipeline.train_stages import extractor_of, loss_of, trained_whole
    from coda_ray.training.checkpoints import write_tensors

    channels = len(config.ingest.channels)
    for stage in stages:
        if stage.kind not in ("pretrain", "classify", "adapt", "moments"):  # type: ignore[attr-defined]
            continue
        torch.manual_seed(int(stage.key[:8], 16))
        file, more = "model.safetensors", {}
        whole = trained_whole(stage)
        if stage.kind == "moments":
            file, more = SUMS, {"plates": ["b0/p"]}
            state = {"count": torch.ones(1), "sums": torch.rand(1, 2, 2, config.model.width)}
        elif stage.kind == "classify" or whole:
            of = stage.needs[0] if whole else stage
            model = networks.classifier_model(config, channels=channels, classes=len(of.inputs["classes"]), dual=bool(of.needs))
            if isinstance(model, DualModel):
                model.replace_extractor(extractor_of(config, of.needs[0]))
            state = {f"model.{name}": value for name, value in model.state_dict().items()}
        elif loss_of(stage) == "mae":
            state = networks.mae_objective(config, channels=channels, seed=0).state_dict()
        else:
            state = networks.dino_objective(config, channels=channels, steps=4, steps_per_epoch=2, seed=0).state_dict()
            # A student and its teacher begin alike.
            state |= {name: value + 1 for name, value in state.items() if name.startswith("student.")}
        folder = open_place(config.results).child(stage.path)
        note = {"stage": stage.kind, "key": stage.key, "title": stage.title, "inputs": dict(stage.inputs)}
        below = {need.path: need.facts(open_place(config.results))["sha256"] for need in stage.needs}
        folder.write("stage.json", json.dumps(note | {"needs": list(below), "made_of": below}).encode())
        facts = {"sha256": write_tensors(folder, file, state), "steps": 4, "seconds": 1.0, **more}
        folder.write("done.json", json.dumps(facts).encode())


def model_on(pretrained: object) -> object:
    """The model of a pre-training, where its classifier plays no part."""
    from coda_ray.pipeline.request import Model

    return Model("", pretrained, pretrained)  # type: ignore[arg-type]


def random_export(config: Config, **origin: object) -> dict[str, bytes]:
    """Weights and description of a small supervised model of two classes, with random weights."""
    import torch

    from coda_ray.learn.exported import pack
    from coda_ray.learn.supervised import SupervisedModel
    from coda_ray.learn.vit import VitSpec, build_vit

    channels = list(config.ingest.channels)
    spec = VitSpec("vit", image_size=24, channels=len(channels), patch=8, width=16, depth=1, heads=2)
    torch.manual_seed(0)
    own = {"method": "supervised", "source": "s", "target": "s", "granularity": "source", "unit": "s", "seed": 0, **origin}
    facts = {"channels": channels, "classes": ["x", "y"], "preparation": preparation_of(config), "origin": own}
    return pack(SupervisedModel(build_vit(spec, drop_path=0.0), 2), spec, {**facts, "view": {"tile_crop": 32, "size": 24}})


def place(path: Path) -> Place:
    """A folder as a place."""
    return Place(address=str(path))
