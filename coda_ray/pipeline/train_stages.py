"""The stages that train: pretrain (DINO on the source), classify (labels of the source), adapt (DINO on the target)."""

import hashlib
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from coda_ray.analysis.knn import knn_accuracy
from coda_ray.config import Config, Granularity, Optimisation, steps_of
from coda_ray.learn.dual import DualModel
from coda_ray.learn.objectives import DinoObjective, SupervisedObjective
from coda_ray.learn.precision import Precision
from coda_ray.learn.supervised import SupervisedModel
from coda_ray.learn.vit import tokens
from coda_ray.pipeline import data, networks
from coda_ray.pipeline.stage import Stage, Workload
from coda_ray.storage import Folder, open_place
from coda_ray.tiles.plan import SamplePlan
from coda_ray.tiles.reader import TileSource
from coda_ray.tiles.store import TileIndex
from coda_ray.training.checkpoints import read_tensors
from coda_ray.training.infer import gather, infer
from coda_ray.training.loop import Monitor, Report, TrainingRun, Work, train_loop

KNN_NEIGHBOURS = 50
Made = tuple[Callable[[Mapping[str, Any]], dict[str, Any]], Any]


def pretrain(config: Config, source: str, *, cross_batch: bool, seed: int) -> Stage:
    """Plan self-supervised pre-training on a source's training plates (CODA, section 3).

    Parameters
    ----------
    config
        Settings.
    source
        Source to learn.
    cross_batch
        Pairs across batches (dual-cb, CODA) or single images (dual-dino, ODA).
    seed
        Seed of weights, samples and views.

    Raises
    ------
    DataError
        When tiles have no partner and `adapt.no_partner` is `error`.
    """
    tiles = data.unlabelled(data.training_tiles(config, source))
    note = tiles.check_partners(config, f"pretrain on {source}") if cross_batch else None
    if config.train.knn_every:
        data.labelled_held_out(config, source)
    inputs = {
        **_inputs(config, config.pretrain, seed, "dino"),
        "source": source,
        "cross_batch": cross_batch,
        "tiles": tiles.fingerprints,
    }
    title = f"pretrain {'dino-cb' if cross_batch else 'dino'} on {source}, seed {seed}"
    epoch = len(tiles.anchors) // config.pretrain.minibatch
    build = partial(_dino_work, config, tiles, config.pretrain, epoch, seed, cross_batch, None, source)
    make = partial(_make, config, config.pretrain, epoch, seed, title, build, note)
    workload = _workload("dino", tiles.anchored(), config.pretrain, epoch, pairs=cross_batch)
    return Stage("pretrain", title, inputs, make, workload=workload)


def classify(config: Config, source: str, *, seed: int, extractor: Stage | None) -> Stage:
    """Plan labelled training on a source's training plates: the supervised model, or a dual model's classifier.

    Parameters
    ----------
    config
        Settings.
    source
        Source whose labels are used.
    seed
        Seed of weights, samples and views.
    extractor
        The pre-training whose teacher is the frozen feature extractor; None trains the supervised model.
    """
    index = data.training_tiles(config, source).labelled()
    classes = data.classes_of(config, source)
    inputs = {
        **_inputs(config, config.classify, seed),
        "source": source,
        "tiles": index.fingerprint,
        "held_out": data.labelled_held_out(config, source).fingerprint,
        "classes": classes,
    }
    title = f"classify {'dual' if extractor else 'supervised'} on {source}, seed {seed}"
    if extractor:
        title = title.replace("dual", "dual-cb" if extractor.inputs["cross_batch"] else "dual-dino")
    epoch = len(index) // config.classify.minibatch
    build = partial(_classify_work, config, source, index.fingerprint, classes, seed, extractor)
    make = partial(_make, config, config.classify, epoch, seed, title, build, None)
    workload = _workload("supervised", index, config.classify, epoch)
    return Stage("classify", title, inputs, make, (extractor,) if extractor else (), workload)


def adapt(config: Config, pretrained: Stage, target: str, *, granularity: Granularity, unit: str, seed: int) -> Stage:
    """Plan label-free adaptation of the feature extractor to one unit of a target (CODA, section 3).

    Student, teacher and both heads continue from the pre-training; optimizer, schedules and centre start anew. With a
    pre-training of cross-batch pairs the adaptation has them too (CODA), otherwise not (ODA). The number of steps is the
    same at every granularity: an epoch counts the tiles of the whole target.

    Raises
    ------
    DataError
        When tiles have no partner and `adapt.no_partner` is `error`.
    """
    cross_batch = bool(pretrained.inputs["cross_batch"])
    tiles = data.adaptation_tiles(config, target, granularity, unit)
    method = "coda" if cross_batch else "oda"
    title = f"adapt {method} {pretrained.inputs['source']} to {target} {granularity} {unit}, seed {seed}"
    note = tiles.check_partners(config, title) if cross_batch else None
    optimisation = config.adapt
    if granularity != "source" and optimisation.minibatch_unit:
        optimisation = optimisation.model_copy(update={"minibatch": optimisation.minibatch_unit})
    inputs = {
        **_inputs(config, optimisation, seed, "dino"),
        "target": target,
        "granularity": granularity,
        "unit": unit,
        "tiles": tiles.fingerprints,
    }
    epoch = len(data.load_tiles(config, target)) // config.adapt.minibatch
    build = partial(_dino_work, config, tiles, optimisation, epoch, seed, cross_batch, pretrained, None)
    make = partial(_make, config, optimisation, epoch, seed, title, build, note)
    workload = _workload("dino", tiles.anchored(), optimisation, epoch, pairs=cross_batch)
    return Stage("adapt", title, inputs, make, (pretrained,), workload)


def stage_tensors(config: Config, stage: Stage) -> dict[str, torch.Tensor]:
    """Read the weights that a finished stage wrote.

    Raises
    ------
    FileNotFoundError
        When it is not finished.
    """
    results = open_place(config.results)
    facts = stage.facts(results)
    if facts is None:
        raise FileNotFoundError(f"{results.address(stage.path)}: {stage.title} is not finished; run it again")
    return read_tensors(results.child(stage.path), "model.safetensors", facts["sha256"])


def teacher_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Pick the teacher's backbone, which is the feature extractor."""
    return {name.removeprefix("teacher."): value for name, value in tensors.items() if name.startswith("teacher.")}


def _inputs(config: Config, optimisation: Optimisation, seed: int, *sections: str) -> dict[str, Any]:
    """Collect the settings that decide the result of a training stage."""
    names = ("model", "views", *sections)
    chosen = {name: getattr(config, name).model_dump(mode="json") for name in names}
    if config.model.init.endswith(".safetensors"):
        chosen["weights"] = {"sha256": _sha256(config.model.init)}
    # `minibatch` holds what counts.
    rates = optimisation.model_dump(mode="json", exclude={"minibatch_unit"})
    return {**chosen, "optimisation": rates, "seed": seed, "precision": config.train.precision}


@lru_cache(maxsize=4)
def _sha256(path: str) -> str:
    """Hash a local file of weights, so that other weights under its name make another stage."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _steps(optimisation: Optimisation, epoch: int) -> int:
    """Length of a training stage; `epoch` is what `N epochs` count, in steps."""
    return max(1, steps_of(optimisation.steps, max(1, epoch)))


def _workload(
    rate: Literal["dino", "supervised"], index: TileIndex, optimisation: Optimisation, epoch: int, *, pairs: bool = False
) -> Workload:
    """Count what a training stage has to do."""
    steps = _steps(optimisation, epoch)
    return Workload(
        rate,
        source=index.units("source")[0],
        plates=len(index.units("plate")),
        tiles=len(index),
        steps=steps,
        minibatch=optimisation.minibatch,
        samples=steps * optimisation.minibatch,
        tiles_per_sample=2 if pairs else 1,
    )


def _make(
    config: Config,
    optimisation: Optimisation,
    epoch: int,
    seed: int,
    title: str,
    build: Callable[[], Work],
    note: str | None,
    folder: Folder,
    report: Report | None,
) -> Made:
    """Describe a training run to the worker loop."""
    if note:
        print(note, flush=True)
    run = TrainingRun(
        title=title,
        folder=folder,
        seed=seed,
        steps=_steps(optimisation, epoch),
        warmup=steps_of(optimisation.warmup, max(1, epoch)),
        optimisation=optimisation,
        train=config.train,
        stream=config.stream,
        build=build,
        report=report,
    )
    return train_loop, run


def _dino_work(
    config: Config,
    tiles: data.UnlabelledTiles,
    optimisation: Optimisation,
    epoch: int,
    seed: int,
    cross_batch: bool,
    start: Stage | None,
    monitored: str | None,
) -> Work:
    """Build DINO on the worker, from initial weights or from a pre-training."""
    epoch = max(1, epoch)
    objective = networks.dino_objective(
        networks.unfilled(config) if start else config,
        channels=len(tiles.pool.channels),
        steps=steps_of(optimisation.steps, epoch),
        steps_per_epoch=epoch,
        seed=seed,
    )
    if start is not None:
        objective.warm_start(stage_tensors(config, start))
    source = tiles.source(seed=seed, crop=config.views.tile_crop, cross_batch=cross_batch)
    monitor = None
    if monitored and config.train.knn_every:
        monitor = Monitor(config.train.knn_every, partial(_knn, config, monitored, objective))
    return Work(objective, source, networks.collapse_guard(config), monitor)


def _knn(config: Config, source: str, objective: DinoObjective, device: torch.device, precision: Precision) -> dict[str, float]:
    """Score the teacher's CLS tokens by nearest neighbours: training tiles answer for the held-out plate."""
    classes = data.classes_of(config, source)
    embedded: list[tuple[NDArray[np.float32], NDArray[np.int64]]] = []
    for index in (data.training_tiles(config, source).labelled(), data.labelled_held_out(config, source)):
        found = gather(
            infer(
                lambda views: tokens(objective.teacher.backbone, views)[:, 0],
                index,
                crop=config.views.tile_crop,
                size=config.views.size_global,
                minibatch=config.evaluate.minibatch,
                stream=config.stream,
                device=device,
                precision=precision,
            )
        )
        embedded.append((found.values, data.label_codes(index, classes)[found.rows]))
    (bank, bank_labels), (queries, labels) = embedded
    return {"knn": knn_accuracy(bank, bank_labels, queries, labels, k=KNN_NEIGHBOURS)}


def _classify_work(config: Config, source: str, fingerprint: str, classes: list[str], seed: int, extractor: Stage | None) -> Work:
    """Build the labelled stage on the worker."""
    index = data.training_tiles(config, source).labelled()
    if index.fingerprint != fingerprint:
        raise data.DataError(f"the tiles of {source} have changed since this job was planned; start it again")
    model = networks.classifier_model(config, channels=len(index.channels), classes=len(classes), dual=extractor is not None)
    if extractor is not None and isinstance(model, DualModel):
        model.replace_extractor(teacher_of(stage_tensors(config, extractor)))
    plan = SamplePlan(seed, data.unlabelled(index).anchors)
    labels = data.label_codes(index, classes)
    monitor = Monitor(
        config.classify.validate_every,
        partial(_validate, config, data.labelled_held_out(config, source), classes, model),
        select="held_out_accuracy" if config.classify.select == "best" else None,
    )
    return Work(
        SupervisedObjective(model, recipe=networks.recipe(config), seed=seed),
        TileSource(index, plan, config.views.tile_crop, labels),
        monitor=monitor,
    )


def _validate(
    config: Config,
    index: TileIndex,
    classes: list[str],
    model: SupervisedModel | DualModel,
    device: torch.device,
    precision: Precision,
) -> dict[str, float]:
    """Score the current weights on the source's held-out plate."""
    found = gather(
        infer(
            lambda views: model(views)[0],
            index,
            crop=config.views.tile_crop,
            size=config.views.size_global,
            minibatch=config.evaluate.minibatch,
            stream=config.stream,
            device=device,
            precision=precision,
        )
    )
    labels = data.label_codes(index, classes)[found.rows]
    return {"held_out_accuracy": float((found.values.argmax(1) == labels).mean())}
