"""The small backbone that the package ships: pre-training on a pool of simulated labs, and the files that come of it."""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import save

from coda_ray.config import Config, pool_of
from coda_ray.jump.simulate.settings import SIMULATOR_VERSION, SimulateSettings
from coda_ray.learn.vit import SHIPPED
from coda_ray.pipeline.matrix import raise_failures, run_stages
from coda_ray.pipeline.stage import with_needs
from coda_ray.pipeline.train_stages import extractor_of, pretrain
from coda_ray.progress import Say
from coda_ray.storage import open_place

_CARD = """# The small backbone

`{file}`: a vision transformer of {parameters:,} parameters in half precision, SHA-256
`{sha256}`.
`model.init: simulated` starts every network with it.

| | |
| --- | --- |
| made by | `python jobs/backbone.py --config configs/backbone.yaml` |
| architecture | patch {model.patch}, width {model.width}, depth {model.depth}, {model.heads} heads, {channels} |
| data | {labs} simulated labs of one world (seed {world.seed}, simulator version {version}), {moas} mechanisms, \
{compounds} compounds, {tiles:,} images, no real image |
| training | cross-batch DINO, partners also from other labs; {steps:,} steps of {minibatch} pairs, seed {seed}; \
k-NN score of held-out plates {knn} |
| labels | none in training; the k-NN score reads them |

No demo, test or study uses this world. The weights know how simulated cells look: they are for simulated labs. Start
real images from ImageNet weights (`model.init: imagenet`).
"""


def pretrain_backbone(config: Config, world: SimulateSettings, seed: int, out: Path, say: Say) -> list[Path]:
    """Pre-train on the pool of all labs of a world, and write weights and card.

    Parameters
    ----------
    config
        Settings.
    world
        The labs; their tiles are in the tile store.
    seed
        Seed of weights, samples and views.
    out
        Folder for `simulated.safetensors` (float16, timm's layout) and `README.md`.
    say
        Receives lines of progress.

    Returns
    -------
    list of Path
        The files.

    Raises
    ------
    StagesFailedError
        When the pre-training failed.
    """
    stage = pretrain(config, pool_of(world.sources), objective="dino-cb", seed=seed)
    raise_failures(run_stages(config, with_needs([stage]), say))
    state = {name: value.to(torch.float16).contiguous() for name, value in extractor_of(config, stage).items()}
    weights, card = out / SHIPPED.name, out / "README.md"
    out.mkdir(parents=True, exist_ok=True)
    weights.write_bytes(save(state))
    facts = stage.facts(open_place(config.results)) or {}
    knn = facts.get("last", {}).get("knn")
    card.write_text(
        _CARD.format(
            file=weights.name,
            parameters=sum(value.numel() for value in state.values()),
            sha256=hashlib.sha256(weights.read_bytes()).hexdigest(),
            model=config.model,
            channels=", ".join(config.ingest.channels),
            labs=len(world.sources),
            world=world,
            version=SIMULATOR_VERSION,
            moas=world.moas,
            compounds=world.moas * world.compounds_per_moa,
            tiles=stage.workload.tiles if stage.workload else 0,
            steps=facts["steps"],
            minibatch=config.pretrain.minibatch,
            seed=seed,
            knn="not measured" if knn is None else f"{knn:.2f}",
        ),
        encoding="utf-8",
    )
    return [weights, card]
