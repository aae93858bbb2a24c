"""The stages that train a model on its source: pretrain (no labels), classify (labels); and what every training stage shares."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from timm.models.vision_transformer import VisionTransformer
from torch.nn.functional import cross_entropy

from coda_ray.analysis.knn import knn_accuracy
from coda_ray.config import Config, Dino, Optimisation, pool_of, steps_of
from coda_ray.learn.dual import DualModel
from coda_ray.learn.mae import MaeObjective, MaskedAutoencoder
from coda_ray.learn.objectives import DinoObjective, SupervisedObjective
from coda_ray.learn.precision import Precision
from coda_ray.learn.schedules import Plateau
from coda_ray.learn.supervised import SupervisedModel
from coda_ray.learn.vit import tokens, weights_file
from coda_ray.methods import Loss, model_with, trained_by
from coda_ray.pipeline import data, networks
from coda_ray.pipeline.stage import Stage, Workload, settings_of
from coda_ray.storage import Folder, open_place
from coda_ray.tiles.plan import SamplePlan
from coda_ray.tiles.reader import TileSource
from coda_ray.tiles.store import COMPOUND, TileIndex
from coda_ray.tracking.table import OF_SPLIT
from coda_ray.training.checkpoints import read_tensors
from coda_ray.training.infer import gather, infer
from coda_ray.training.loop import Monitor, Report, TrainingRun, Work, train_loop

KNN_NEIGHBOURS = 50
Made = tuple[Callable[[Mapping[str, Any]], dict[str, Any]], Any]


def pretrain(config: Config, source: str, *, objective: Loss, seed: int) -> Stage:
    """Plan self-supervised pre-training on a source's training plates (CODA, section 3), on all or some compounds (`learn_from`).

    Parameters
    ----------
    config
        Settings.
    source
        Source to learn.
    objective
        `dino-cb`, pairs across batches (dual-cb, CODA); `dino`, single images (dual-dino, ODA); `mae`, masked patches
        (dual-mae, oda-mae, ttt).
    seed
        Seed of weights, samples and views.

    Raises
    ------
    DataError
        When tiles have no partner and `adapt.no_partner` is `error`.
    """
    tiles = data.unlabelled(data.pretraining_tiles(config, source))
    note = tiles.check_partners(config, f"pretrain on {source}", adapting=False) if objective == "dino-cb" else None
    if config.train.knn_every:
        data.labelled_held_out(config, source)
    inputs = {
        **training_inputs(config, config.pretrain, seed, section_of(objective)),
        "source": source,
        "objective": objective,
        "tiles": tiles.fingerprints,
    }
    if config.pretrain.select == "best-knn":
        known = (data.training_tiles(config, source).labelled(), data.labelled_held_out(config, source))
        inputs |= {"knn_every": config.train.knn_every, "scored_by": [index.fingerprint for index in known]}
    title = f"pretrain {objective} on {source}, {named(config, seed)}"
    epoch = len(tiles.anchors) // config.pretrain.minibatch
    pairs = objective == "dino-cb"
    build = partial(self_supervised_work, config, tiles, config.pretrain, epoch, seed, objective, None, source, pairs=pairs)
    make = partial(make_run, config, config.pretrain, epoch, seed, title, build)
    workload = training_workload(section_of(objective), tiles.anchored(), config.pretrain, epoch, pairs=pairs)
    return Stage("pretrain", title, inputs, make, workload=workload, note=note)


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
    optimisation = config.classify
    if optimisation.schedule == "plateau":  # which lowers a constant rate
        optimisation = optimisation.model_copy(update={"lr_end": optimisation.lr})
    inputs = {
        **training_inputs(config, optimisation, seed),
        "source": source,
        "tiles": index.fingerprint,
        "held_out": data.labelled_held_out(config, source).fingerprint,
        "classes": classes,
    }
    inputs |= extractor_input(config, extractor)
    model = model_with(extractor.inputs["objective"] if extractor else None).name
    title = f"classify {model} on {source}, {named(config, seed)}"
    epoch = len(index) // optimisation.minibatch
    every = max(1, steps_of(optimisation.validate_every, max(1, epoch)))
    build = partial(_classify_work, config, source, index.fingerprint, classes, every, seed, extractor)
    make = partial(make_run, config, optimisation, epoch, seed, title, build)
    workload = training_workload("supervised", index, optimisation, epoch)
    return Stage("classify", title, inputs, make, (extractor,) if extractor else (), workload)


def paused(config: Config, whole: Stage, until: int) -> Stage:
    """Plan a training stage's state in the middle; its checkpoints are those of the whole."""

    def make(folder: Folder, report: Report | None) -> Made:
        loop, run = whole.make(folder, report)
        # Under the same lease as the folder.
        return loop, replace(run, until=until, checkpoints=replace(folder, root=open_place(config.results).path(whole.path)))

    title = f"{whole.title}, until step {until}"
    return Stage(whole.kind, title, {**whole.inputs, "until": until}, make, whole.needs, note=whole.note, whole=whole)


def stage_tensors(config: Config, stage: Stage, name: str = "model.safetensors") -> dict[str, torch.Tensor]:
    """Read the weights, or the other tensors, that a finished stage wrote.

    Raises
    ------
    FileNotFoundError
        When it is not finished.
    """
    results = open_place(config.results)
    facts = stage.facts(results)
    if facts is None:
        raise FileNotFoundError(f"{results.address(stage.path)}: {stage.title} is not finished; run it again")
    # Stages of before attempts had names of their own tell none.
    return read_tensors(results.child(stage.path), facts.get("file", name), facts["sha256"])


def lineage(stage: Stage) -> list[Stage]:
    """List an adaptation after those that it goes on from; first what the first of them adapts, a pre-training or (Tent) a model.

    Parameters
    ----------
    stage
        An adaptation; anything else stands for itself.
    """
    return [*lineage(stage.needs[0]), stage] if stage.kind == "adapt" else [stage]


def root_of(stage: Stage) -> Stage:
    """Find what an adaptation, or the first of a chain, adapts: a pre-training, or (Tent) a labelled stage."""
    return lineage(stage)[0]


def objective_of(stage: Stage) -> str:
    """Name what a pre-training or an adaptation minimises; one that names nothing goes on with what it continues."""
    own: str | None = stage.inputs.get("objective")
    return objective_of(stage.needs[0]) if own is None else own


def loss_of(stage: Stage) -> Loss | None:
    """Name the self-supervised loss of the networks of a pre-training or of an adaptation; None: there is none."""
    objective = objective_of(stage)
    return trained_by(objective).loss if stage.kind == "adapt" else cast(Loss, objective)


def extractor_of(config: Config, stage: Stage) -> dict[str, torch.Tensor]:
    """Read the feature extractor that a finished pre-training or adaptation made: a teacher (or student), or an encoder."""
    prefix = f"{_extractor_name(config, stage)}."
    tensors = stage_tensors(config, stage)
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def extractor_input(config: Config, stage: Stage | None) -> dict[str, str]:
    """Name which network of a pre-training or adaptation is the feature extractor, for a key; left out where it is as always."""
    if stage is None or trained_whole(stage):
        return {}
    name = _extractor_name(config, stage)
    return {} if name in ("teacher", "encoder") else {"extractor": name}


def trained_whole(stage: Stage) -> bool:
    """Whether an adaptation holds the whole model, and not a feature extractor alone."""
    return stage.kind == "adapt" and trained_by(objective_of(stage)).trains == "model"


def _extractor_name(config: Config, stage: Stage) -> str:
    """Name the network of a stage that is the feature extractor."""
    if loss_of(stage) == "mae":
        return "encoder"
    section = trained_by(objective_of(stage)).section if stage.kind == "adapt" else None
    return config.shot.extractor if section == "shot" else config.dino.extractor


def load_model(config: Config, classifier: Stage, adapted: Stage | None, channels: int) -> SupervisedModel | DualModel:
    """Load the model of a finished labelled stage, as it is or after an adaptation.

    Parameters
    ----------
    config
        Settings.
    classifier
        The labelled stage.
    adapted
        An adaptation of the whole model, or of the feature extractor, which replaces the model's; None takes the model as it is.
    channels
        Channels of a tile.

    Raises
    ------
    TypeError
        When a supervised model is to get another feature extractor.
    """
    classes, dual = classifier.inputs["classes"], bool(classifier.needs)
    model = networks.classifier_model(networks.unfilled(config), channels=channels, classes=len(classes), dual=dual)
    whole = adapted if adapted and trained_whole(adapted) else classifier
    model.load_state_dict({name.removeprefix("model."): value for name, value in stage_tensors(config, whole).items()})
    if adapted is not None and whole is classifier:
        if not isinstance(model, DualModel):
            raise TypeError(f"{classifier.title}: only a dual model has a feature extractor that can be adapted")
        model.replace_extractor(extractor_of(config, adapted))
    return model


def section_of(loss: Loss | None) -> Literal["dino", "mae"]:
    """Name the section of the configuration that holds a self-supervised loss's settings."""
    return "mae" if loss == "mae" else "dino"


def named(config: Config, seed: int, *, on_target: bool = False) -> str:
    """End the title of a training stage: what else tells it from its likes.

    On the source, both splits that hold compounds out train the same.
    """
    split = config.split if on_target or config.split == "plate" else "compounds"
    return f"seed {seed}{OF_SPLIT[split]}"


def training_inputs(config: Config, optimisation: Optimisation, seed: int, *sections: str) -> dict[str, Any]:
    """Collect the settings that decide the result of a training stage."""
    names = ("model", "views", *sections)
    # The extractor is chosen when the finished stage is used.
    chosen: dict[str, Any] = {name: settings_of(getattr(config, name), exclude={"extractor"}) for name in names}
    if file := weights_file(config.model.init):
        chosen["weights"] = {"sha256": _sha256(str(file))}
    # `minibatch` holds what counts, and the unit stands for itself.
    rates = settings_of(optimisation, exclude={"minibatch_unit", "unit", "plates", "dino", "standardise"})
    return {**chosen, "optimisation": rates, "seed": seed, "precision": config.train.precision}


def epoch_counted(epoch: int, optimisation: Optimisation, dino: Dino | None = None) -> dict[str, int]:
    """Make the length of an epoch an input, where a setting counts epochs and no fingerprint holds what they count."""
    durations = [optimisation.steps, optimisation.warmup]
    if dino is not None:
        durations += [dino.teacher_temperature_ramp, dino.freeze_last_layer]
    return {"epoch": epoch} if any(isinstance(duration, str) for duration in durations) else {}


@lru_cache(maxsize=4)
def _sha256(path: str) -> str:
    """Hash a local file of weights, so that other weights under its name make another stage."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _steps(optimisation: Optimisation, epoch: int) -> int:
    """Length of a training stage; `epoch` is what `N epochs` count, in steps."""
    return max(1, steps_of(optimisation.steps, max(1, epoch)))


def training_workload(rate: str, index: TileIndex, optimisation: Optimisation, epoch: int, *, pairs: bool = False) -> Workload:
    """Count what a training stage has to do."""
    steps = _steps(optimisation, epoch)
    return Workload(
        rate,
        source=pool_of(index.units("source")),
        plates=index.count("plate"),
        tiles=len(index),
        steps=steps,
        minibatch=optimisation.minibatch,
        samples=steps * optimisation.minibatch,
        tiles_per_sample=2 if pairs else 1,
    )


def make_run(
    config: Config,
    optimisation: Optimisation,
    epoch: int,
    seed: int,
    title: str,
    build: Callable[[], Work],
    folder: Folder,
    report: Report | None,
) -> Made:
    """Describe a training run to the worker loop."""
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


def self_supervised_work(
    config: Config,
    tiles: data.UnlabelledTiles,
    optimisation: Optimisation,
    epoch: int,
    seed: int,
    objective: Loss,
    start: Stage | None,
    monitored: str | None,
    *,
    pairs: bool,
) -> Work:
    """Build DINO or the masked autoencoder on the worker, from initial weights, a pre-training or an adaptation."""
    epoch = max(1, epoch)
    settings, channels = networks.unfilled(config) if start else config, len(tiles.pool.channels)
    learner: DinoObjective | MaeObjective
    if objective == "mae":
        learner = networks.mae_objective(settings, channels=channels, seed=seed)
        watched, guard = cast(MaskedAutoencoder, learner.network).encoder, None
    else:
        steps = steps_of(optimisation.steps, epoch)
        learner = networks.dino_objective(settings, channels=channels, steps=steps, steps_per_epoch=epoch, seed=seed)
        chosen = learner.student if config.dino.extractor == "student" else learner.teacher
        watched = chosen.backbone
        compounds = tiles.anchored().frame[COMPOUND].nunique()
        guard = networks.collapse_guard(config, compounds=compounds, section="dino" if start is None else "adapt.dino")
    if start is not None:
        learner.warm_start(stage_tensors(config, start))
    source = tiles.source(seed=seed, crop=config.views.tile_crop, pairs=config.dino.pairs if pairs else None)
    monitor = None
    if monitored and config.train.knn_every:
        every = max(1, steps_of(config.train.knn_every, epoch))
        select = "knn" if config.pretrain.select == "best-knn" else None
        monitor = Monitor(every, partial(_knn, config, monitored, watched), select)
    return Work(learner, source, guard, monitor)


def _knn(config: Config, source: str, vit: VisionTransformer, device: torch.device, precision: Precision) -> dict[str, float]:
    """Score the extractor's CLS tokens by nearest neighbours: training tiles answer for the held-out plate."""
    classes = data.classes_of(config, source)
    embedded: list[tuple[NDArray[np.float32], NDArray[np.int64]]] = []
    for index in (data.training_tiles(config, source).labelled(), data.labelled_held_out(config, source)):
        found = gather(
            infer(
                lambda views, _: tokens(vit, views)[:, 0],
                index,
                config,
                device=device,
                precision=precision,
            )
        )
        embedded.append((found.values, data.label_codes(index, classes)[found.rows]))
    (bank, bank_labels), (queries, labels) = embedded
    return {"knn": knn_accuracy(bank, bank_labels, queries, labels, k=KNN_NEIGHBOURS)}


def _classify_work(
    config: Config, source: str, fingerprint: str, classes: list[str], every: int, seed: int, extractor: Stage | None
) -> Work:
    """Build the labelled stage on the worker, with a score every so many steps."""
    index = data.training_tiles(config, source).labelled()
    if index.fingerprint != fingerprint:
        raise data.DataError(f"the tiles of {source} have changed since this job was planned; start it again")
    model = networks.classifier_model(config, channels=len(index.channels), classes=len(classes), dual=extractor is not None)
    if extractor is not None and isinstance(model, DualModel):
        model.replace_extractor(extractor_of(config, extractor))
    plan = SamplePlan(seed, data.unlabelled(index).anchors)
    labels = data.label_codes(index, classes)
    monitor = Monitor(
        every,
        partial(_validate, config, data.labelled_held_out(config, source), classes, model),
        select="held_out_accuracy" if config.classify.select == "best" else None,
    )
    return Work(
        SupervisedObjective(model, recipe=networks.recipe(config), seed=seed),
        TileSource(index, plan, config.views.tile_crop, labels),
        monitor=monitor,
        plateau=Plateau(config.classify.plateau_patience) if config.classify.schedule == "plateau" else None,
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
            lambda views, _: model(views)[0],
            index,
            config,
            device=device,
            precision=precision,
        )
    )
    labels = data.label_codes(index, classes)[found.rows]
    loss = cross_entropy(torch.from_numpy(found.values), torch.from_numpy(labels))
    return {"held_out_accuracy": float((found.values.argmax(1) == labels).mean()), "held_out_cross_entropy": float(loss)}
