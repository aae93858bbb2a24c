"""The stage that measures one model of a target without a label of it, for the choice of hyperparameters."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from coda_ray.analysis.cka import MinibatchCka
from coda_ray.analysis.selection import CRITERIA, mean_entropy, mutual_information, rank_me
from coda_ray.config import Config
from coda_ray.learn.mae import MaeObjective
from coda_ray.learn.objectives import DinoObjective
from coda_ray.learn.precision import choose_precision
from coda_ray.pipeline import data, networks
from coda_ray.pipeline.evaluate import FEATURE, PROBABILITY, TILE_ID, embeddings_of, predictions_of
from coda_ray.pipeline.profile import measured, profile
from coda_ray.pipeline.stage import Stage, settings_of
from coda_ray.pipeline.train_stages import Made, loss_of, section_of, stage_tensors
from coda_ray.storage import Folder, open_place
from coda_ray.tiles.store import UNIT_COLUMNS, TileIndex
from coda_ray.tiles.stream import minibatches, on_device
from coda_ray.training.launch import device_of
from coda_ray.training.loop import Report

# Of the tiles, partners, views and masks of the held-out loss: far from the seeds of runs, so that training drew none of them.
SEED = 2**40


@dataclass(frozen=True)
class CriteriaRun:
    """What a worker needs to know; picklable, without weights or features."""

    folder: Folder
    config: Config
    index: TileIndex
    evaluation: Stage
    unadapted: Stage
    profile: Stage
    learnt: tuple[Stage, ...]


def criteria(config: Config, index: TileIndex, evaluation: Stage, trained: Sequence[Stage], unadapted: Stage) -> Stage:
    """Plan the label-free criteria of one model; `analysis.selection.CRITERIA` says which way each is better.

    Facts of the finished stage: `criteria` (every name of CRITERIA; None where the data have nothing to measure), `reasons` (of
    those), tiles, seconds. Where scores of transfers look within a mechanism (kBET, silhouette), these look within a compound.

    Parameters
    ----------
    config
        Settings. The held-out loss takes views and temperatures from it, so give all models that are compared the same `views`,
        and compare the loss of models with the same `dino` or `mae` only.
    index
        The tiles that count, all or some of the evaluated ones (a batch or a plate); no label is read. Partners of the held-out
        loss come from all of them, also where each unit has a model of its own, so that models of every granularity are asked
        for the loss of alike pairs; a tile that has none is its own.
    evaluation
        The stage with the model's predictions and embeddings.
    trained
        The adaptation that made the model, or those that made the models of a combined evaluation, one per unit; none for an
        unadapted one, or a correction of its features.
    unadapted
        The evaluation of the model before adaptation; for an unadapted one `evaluation` again.
    """
    tiles = index.without_labels()
    learnt = _learnt(evaluation, trained)
    profiles = profile(config, tiles, evaluation)
    inputs: dict[str, Any] = {"tiles": tiles.fingerprint, "criteria": settings_of(config.criteria), "names": list(CRITERIA)}
    if learnt:
        names = ("views", section_of(loss_of(learnt[0])))
        inputs |= {name: settings_of(getattr(config, name)) for name in names} | {"precision": config.train.precision}
    if len(learnt) > 1:
        inputs["partners"] = "of all tiles"
    title = f"criteria of {evaluation.title}"
    needs = (profiles, evaluation, unadapted, *learnt)
    make = partial(_make, config, tiles, evaluation, unadapted, profiles, learnt)
    return Stage("criteria", title, inputs, make, needs, runs_on="worker")


def _learnt(evaluation: Stage, trained: Sequence[Stage]) -> tuple[Stage, ...]:
    """Find the stages whose self-supervised networks a model is: a pre-training, or its adaptations."""
    if trained:
        return tuple(stage for stage in trained if loss_of(stage))
    if evaluation.kind != "evaluate" or len(evaluation.needs) > 1:  # a correction, or test-time training
        return ()
    (classifier,) = evaluation.needs
    return classifier.needs


def _make(
    config: Config,
    index: TileIndex,
    evaluation: Stage,
    unadapted: Stage,
    profiles: Stage,
    learnt: tuple[Stage, ...],
    folder: Folder,
    report: Report | None,
) -> Made:
    """Describe the stage to the worker loop; it has no curve to report."""
    return criteria_loop, CriteriaRun(folder, config, index, evaluation, unadapted, profiles, learnt)


def criteria_loop(config: Mapping[str, Any]) -> dict[str, Any]:
    """Compute the loss and the rest, in one process.

    Parameters
    ----------
    config
        `{"run": CriteriaRun}`, as Ray Train passes it.

    Returns
    -------
    dict
        Facts; see `criteria`.
    """
    run: CriteriaRun = config["run"]
    begun = time.monotonic()
    torch.set_num_threads(run.config.train.threads)
    loss = _held_out_losses(run) if run.learnt else None
    found, reasons = _measure(run, loss)
    return {
        "tiles": len(run.index),
        "seconds": round(time.monotonic() - begun, 3),
        "criteria": {name: found[name] for name in CRITERIA},
        "reasons": reasons,
    }


def _measure(run: CriteriaRun, loss: float | None) -> tuple[dict[str, float | None], dict[str, str]]:
    """Compute the criteria on predictions and embeddings, beside those of the profiles."""
    wanted, drawn = (_names(index) for index in (run.index, data.drawn(run.index, run.config.criteria.tiles)))
    predictions = predictions_of(run.config, run.evaluation).set_index(TILE_ID).filter(like=PROBABILITY)
    after, before = (
        embeddings_of(run.config, stage).set_index(TILE_ID).filter(like=FEATURE) for stage in (run.evaluation, run.unadapted)
    )
    features, probabilities = _rows(after, wanted), _rows(predictions, wanted)
    both = drawn[drawn.isin(before.index) & drawn.isin(after.index)]
    found, reasons = measured(
        {
            ("rank_me",): lambda: {"rank_me": rank_me(features)},
            ("mean_entropy",): lambda: {"mean_entropy": mean_entropy(probabilities)},
            ("mutual_information",): lambda: {"mutual_information": mutual_information(probabilities)},
            ("held_out_loss",): lambda: {"held_out_loss": _checked(loss)},
            ("cka_to_source",): lambda: {"cka_to_source": _cka(_rows(before, both), _rows(after, both))},
        }
    )
    facts = run.profile.facts(open_place(run.config.results)) or {}
    return {**facts["scores"], **found}, {**facts["not_measured"], **reasons}


def _held_out_losses(run: CriteriaRun) -> float:
    """Average over models, by the tiles that each of them reads."""
    parts = [anchors_of(run.index, stage if len(run.learnt) > 1 else None) for stage in run.learnt]
    losses = [_held_out_loss(run, stage, part) for stage, part in zip(run.learnt, parts, strict=True)]
    return float(np.average(losses, weights=[len(part.anchors) for part in parts]))


def anchors_of(index: TileIndex, stage: Stage | None) -> data.UnlabelledTiles:
    """Choose the tiles that a model is asked about, with partners from all: those of an adaptation's unit; None: every tile."""
    tiles = data.unlabelled(index)
    if stage is None:
        return tiles
    inside = tiles.pool.frame[UNIT_COLUMNS[stage.inputs["granularity"]]] == stage.inputs["unit"]
    return data.UnlabelledTiles(tiles.pool, np.flatnonzero(inside).astype(np.int64))


def _held_out_loss(run: CriteriaRun, learnt: Stage, tiles: data.UnlabelledTiles) -> float:
    """Ask the networks for their own loss on tiles drawn by chance, in views that training did not draw."""
    config, loss = run.config, loss_of(learnt)
    settings, channels = networks.unfilled(config), len(tiles.pool.channels)
    learner: DinoObjective | MaeObjective
    if loss == "mae":
        learner = networks.mae_objective(settings, channels=channels, seed=SEED)
    else:
        learner = networks.dino_objective(settings, channels=channels, steps=1, steps_per_epoch=1, seed=SEED)
    learner.load_state_dict(stage_tensors(config, learnt))
    device = device_of(config.train)
    learner.to(device)
    pairs = config.dino.pairs if loss == "dino-cb" else None
    count, size = min(len(tiles.anchors), config.criteria.tiles), config.evaluate.minibatch
    stream = minibatches(
        tiles.source(seed=SEED, crop=config.views.tile_crop, pairs=pairs),
        config.stream,
        minibatch=size,
        start_step=0,
        steps=-(-count // size),
        last=count,
    )
    with choose_precision(device, config.train.precision).autocast():
        return learner.held_out_loss(on_device(stream, device))


def _checked(loss: float | None) -> float:
    """Refuse what is no loss."""
    if loss is None:
        raise ValueError("the model has no self-supervised loss; dual models, oda, coda and oda-mae have one")
    if not math.isfinite(loss):
        raise ValueError(f"the loss is {loss}; the model that gave it has diverged")
    return loss


def _cka(before: NDArray[np.float32], after: NDArray[np.float32]) -> float:
    """Compare the features of the same tiles, all at once."""
    cka = MinibatchCka()
    cka.update([before], [after])
    return float(cka.matrix()[0, 0])


def _names(index: TileIndex) -> pd.MultiIndex:
    """Name tiles as the tables of evaluations do."""
    return pd.MultiIndex.from_frame(index.frame[TILE_ID])


def _rows(table: pd.DataFrame, wanted: pd.MultiIndex) -> NDArray[np.float32]:
    """Take the wanted rows that a table has, (N, D)."""
    return table.loc[wanted[wanted.isin(table.index)]].to_numpy(np.float32)
