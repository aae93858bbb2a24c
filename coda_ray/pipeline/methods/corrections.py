"""Baselines on features: correct the embeddings of a finished evaluation, and read them by a linear classifier of the source."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from coda_ray.analysis.corrections import LinearProbe, Sphering, harmony
from coda_ray.config import Config, ConfigError, Granularity
from coda_ray.jump.tables import CONTROL, NEGATIVE_CONTROL
from coda_ray.pipeline import data
from coda_ray.pipeline.evaluate import FEATURE, TILE_ID, embeddings_of, evaluate, write_predictions
from coda_ray.pipeline.request import Model, Request
from coda_ray.pipeline.stage import Stage
from coda_ray.pipeline.train_stages import Made
from coda_ray.storage import Folder
from coda_ray.tiles.store import UNIT_COLUMNS, TileIndex
from coda_ray.training.loop import Report

Correction = Literal["probe", "sphering", "harmony"]
Rows = NDArray[np.float32]


@dataclass(frozen=True)
class CorrectionRun:
    """What a correction needs to know; picklable, without features."""

    title: str
    folder: Folder
    config: Config
    method: Correction
    source: Stage
    target: Stage
    labelled: TileIndex
    classes: tuple[str, ...]
    unit: tuple[str, str]
    seed: int


def correct(
    config: Config,
    method: Correction,
    classifier: Stage,
    source: Stage,
    target: Stage,
    *,
    granularity: Granularity,
    unit: str,
    seed: int,
) -> Stage:
    """Plan one correction; no label of the target takes part.

    A multinomial logistic regression is trained once, on the source's features, corrected in the same manner as the target's:

    - `probe`: not corrected; what the linear classifier does by itself;
    - `sphering`: typical variation normalisation, fitted on the DMSO images of the unit (of the source: on its own);
    - `harmony`: source and unit together, batch by batch; only images of the unit get a prediction.

    Parameters
    ----------
    config
        Settings.
    method
        The correction.
    classifier
        The labelled stage of the model whose features are corrected.
    source, target
        Evaluations of that model on the source's training tiles and on the target.
    granularity, unit
        What of the target the correction is fitted to.
    seed
        Seed of Harmony's clusters.

    Raises
    ------
    ConfigError
        When Harmony is asked for and not installed, or would be fitted to compounds that are held out.
    """
    if method == "harmony":
        _check_harmony(config)
    labelled = data.training_tiles(config, classifier.inputs["source"]).labelled()
    column = UNIT_COLUMNS[granularity]
    inputs: dict[str, Any] = {"method": method, "unit": [column, unit], "labels": labelled.fingerprint}
    if method == "sphering":
        inputs["epsilon"] = config.baselines.sphering_epsilon
    if method == "harmony":
        inputs["seed"] = seed
    title = f"{method} of {target.title}, fitted to {granularity} {unit}"
    classes = tuple(classifier.inputs["classes"])
    make = partial(_make, config, title, method, source, target, labelled, classes, (column, unit), seed)
    return Stage("correct", title, inputs, make, (source, target), runs_on="cpu")


def corrected(
    config: Config, method: Correction, request: Request, model: Model, before: Stage, *, granularity: Granularity, unit: str
) -> Stage:
    """Plan one correction of a model's features on a target; `before` is the evaluation of the model there."""
    known, named = data.training_tiles(config, request.source), f"the training tiles of {request.source}"
    source = evaluate(config, known, named, model.classifier)
    return correct(config, method, model.classifier, source, before, granularity=granularity, unit=unit, seed=request.seed)


def _check_harmony(config: Config) -> None:
    """Refuse what Harmony cannot do."""
    if find_spec("harmonypy") is None:
        raise ConfigError("method harmony needs the package harmonypy (GPL-3.0-or-later): pip install '.[harmony]'")
    if config.split == "compounds":
        raise ConfigError(
            "method harmony with split compounds: Harmony corrects the very images that it is fitted to, so no compound can be "
            "held out of it; leave the method out there, or score it with split plate"
        )


def _make(
    config: Config,
    title: str,
    method: Correction,
    source: Stage,
    target: Stage,
    labelled: TileIndex,
    classes: tuple[str, ...],
    unit: tuple[str, str],
    seed: int,
    folder: Folder,
    report: Report | None,
) -> Made:
    """Describe a correction to the worker loop; it has no curve to report."""
    return correct_loop, CorrectionRun(title, folder, config, method, source, target, labelled, classes, unit, seed)


def correct_loop(config: Mapping[str, Any]) -> dict[str, Any]:
    """Correct and classify.

    Parameters
    ----------
    config
        `{"run": CorrectionRun}`, as Ray Train passes it.

    Returns
    -------
    dict
        Facts: tiles, seconds.
    """
    run: CorrectionRun = config["run"]
    begun = time.monotonic()
    known, wanted = embeddings_of(run.config, run.source), embeddings_of(run.config, run.target)
    inside = (wanted[run.unit[0]] == run.unit[1]).to_numpy()
    if run.method == "harmony":
        wanted, inside = wanted[inside], inside[inside]
    features_known, features = _corrected(run, known, wanted, inside)
    codes = data.label_codes(run.labelled, list(run.classes))
    of_tile = pd.Series(codes, index=pd.MultiIndex.from_frame(run.labelled.frame[TILE_ID]))
    labels = of_tile.reindex(pd.MultiIndex.from_frame(known[TILE_ID])).fillna(-1).to_numpy(np.int64)
    probe = LinearProbe.fit(features_known[labels >= 0], labels[labels >= 0], len(run.classes))
    write_predictions(run.folder, wanted.filter(like="Metadata_"), run.classes, probe.probabilities(features), features)
    facts = {"tiles": len(wanted), "seconds": round(time.monotonic() - begun, 3)}
    run.folder.write("done.json", json.dumps(facts, indent=1).encode())
    return facts


def _corrected(run: CorrectionRun, known: pd.DataFrame, wanted: pd.DataFrame, inside: NDArray[np.bool_]) -> tuple[Rows, Rows]:
    """Correct the features of the source and of the target, each (N, D)."""
    ours, theirs = (frame.filter(like=FEATURE).to_numpy(np.float32) for frame in (known, wanted))
    if run.method == "sphering":
        epsilon = run.config.baselines.sphering_epsilon
        everywhere = np.ones(len(known), bool)
        controls = ours[_untreated(known, everywhere, run.title)], theirs[_untreated(wanted, inside, run.title)]
        fitted = [Sphering.fit(rows, regularisation=epsilon) for rows in controls]
        return fitted[0].transform(ours), fitted[1].transform(theirs)
    if run.method == "harmony":
        both = pd.concat([known, wanted])
        batches = (both["Metadata_Source"] + "/" + both["Metadata_Batch"]).to_numpy(str)
        mixed = harmony(np.concatenate([ours, theirs]), batches, seed=run.seed)
        return mixed[: len(ours)], mixed[len(ours) :]
    return ours, theirs


def _untreated(frame: pd.DataFrame, inside: NDArray[np.bool_], title: str) -> NDArray[np.bool_]:
    """Find the images of DMSO wells among some.

    Raises
    ------
    ConfigError
        When there is none.
    """
    found: NDArray[np.bool_] = inside & (frame[CONTROL] == NEGATIVE_CONTROL).to_numpy()
    if not found.any():
        raise ConfigError(
            f"{title}: no tile of it has {CONTROL} = {NEGATIVE_CONTROL}, so there is nothing to fit sphering on; ingest the "
            "plates with their compound tables, or leave the method out"
        )
    return found
