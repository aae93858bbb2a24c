"""Baselines on features: correct the embeddings of a finished evaluation, and read them by a linear classifier of the source."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from coda_ray.analysis.corrections import Coral, LinearProbe, Sphering, harmony, zscore_plates
from coda_ray.analysis.retrieval import replicate_precision
from coda_ray.config import Config, ConfigError, Granularity
from coda_ray.jump.tables import CONTROL, NEGATIVE_CONTROL, UNTREATED
from coda_ray.pipeline import data
from coda_ray.pipeline.evaluate import FEATURE, TILE_ID, embeddings_of, evaluate, write_predictions
from coda_ray.pipeline.profile import well_profiles
from coda_ray.pipeline.request import Model, Request
from coda_ray.pipeline.stage import Stage
from coda_ray.pipeline.train_stages import Made
from coda_ray.storage import Folder
from coda_ray.tiles.store import COMPOUND, UNIT_COLUMNS, TileIndex
from coda_ray.training.loop import Report

Correction = Literal["probe", "sphering", "coral", "harmony"]
Rows = NDArray[np.float32]
Mask = NDArray[np.bool_]
# Of `baselines.sphering_epsilon: auto`; of equals the first, which whitens least.
EPSILONS = (100.0, 10.0, 1.0, 0.1, 0.01, 0.001)


class Side(NamedTuple):
    """Images of the source, or of the target, and which of them count.

    Parameters
    ----------
    frame
        (N,) rows of Metadata_ columns.
    features
        (N, D) embeddings.
    seen
        (N,) those that a plate's mean and spread may come from: all but compounds that are held out.
    fitted
        (N,) those that a correction is fitted to: of the target, those seen of the unit.
    """

    frame: pd.DataFrame
    features: Rows
    seen: Mask
    fitted: Mask

    @property
    def untreated(self) -> Mask:
        """(N,) images of DMSO wells."""
        return (self.frame[CONTROL] == NEGATIVE_CONTROL).to_numpy()

    def named(self, *columns: str) -> NDArray[np.str_]:
        """Join columns to (N,) names, such as source/batch."""
        frame = self.frame[[f"Metadata_{column}" for column in columns]]
        return frame.agg("/".join, axis=1).to_numpy(str)


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
    seen: TileIndex
    classes: tuple[str, ...]
    unit: tuple[str, str]
    seed: int


def correct(
    config: Config,
    method: Correction,
    classifier: Stage,
    source: Stage,
    target: Stage,
    seen: TileIndex,
    *,
    granularity: Granularity,
    unit: str,
    seed: int,
) -> Stage:
    """Plan one correction; no label of the target takes part.

    A multinomial logistic regression is trained once, on the source's features, corrected in the same manner as the target's:

    - `probe`: not corrected; what the linear classifier does by itself;
    - `sphering`: each plate scaled by itself, then typical variation normalisation: one whitening, fitted on the DMSO images of
      source and unit (section `baselines` has other ways, and ε);
    - `coral`: source and unit scaled by themselves, then the source's features coloured like the unit's;
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
    seen
        Tiles of the target that may be fitted to (`data.target_tiles`).
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
        inputs |= _sphering_inputs(config, seen)
    if method == "coral":
        inputs["seen"] = seen.without_labels().fingerprint
    if method == "harmony":
        inputs["seed"] = seed
    title = f"{method} of {target.title}, fitted to {granularity} {unit}"
    classes = tuple(classifier.inputs["classes"])
    make = partial(_make, config, title, method, source, target, labelled, seen.without_labels(), classes, (column, unit), seed)
    return Stage("correct", title, inputs, make, (source, target), runs_on="cpu")


def corrected(
    config: Config, method: Correction, request: Request, model: Model, before: Stage, *, granularity: Granularity, unit: str
) -> Stage:
    """Plan one correction of a model's features on a target; `before` is the evaluation of the model there."""
    known, named = data.training_tiles(config, request.source), f"the training tiles of {request.source}"
    source, seen = evaluate(config, known, named, model.classifier), data.target_tiles(config, request.source, request.target)
    return correct(config, method, model.classifier, source, before, seen, granularity=granularity, unit=unit, seed=request.seed)


def _sphering_inputs(config: Config, seen: TileIndex) -> dict[str, Any]:
    """List the settings that decide a sphering, and its tiles where others than DMSO take part.

    Apart, without scaled plates and by a given ε it is what it was before there were other ways: its key holds no more.
    """
    settings = config.baselines
    chosen = settings.sphering_epsilon == "auto"
    inputs: dict[str, Any] = {"epsilon": list(EPSILONS) if chosen else settings.sphering_epsilon}
    inputs |= {} if settings.zscore == "none" else {"zscore": settings.zscore}
    inputs |= {} if settings.sphering == "apart" else {"sphering": settings.sphering}
    if chosen or settings.zscore == "all":
        inputs["seen"] = seen.without_labels().fingerprint
    return inputs


def _check_harmony(config: Config) -> None:
    """Refuse what Harmony cannot do."""
    if find_spec("harmonypy") is None:
        raise ConfigError("method harmony needs the package harmonypy (GPL-3.0-or-later): pip install '.[harmony]'")
    if config.split == "compounds":
        raise ConfigError(
            "method harmony with split compounds: Harmony corrects the very images that it is fitted to, so no compound can be "
            "held out of it; leave the method out there, or score it with split new-compounds or plate"
        )


def _make(
    config: Config,
    title: str,
    method: Correction,
    source: Stage,
    target: Stage,
    labelled: TileIndex,
    seen: TileIndex,
    classes: tuple[str, ...],
    unit: tuple[str, str],
    seed: int,
    folder: Folder,
    report: Report | None,
) -> Made:
    """Describe a correction to the worker loop; it has no curve to report."""
    return correct_loop, CorrectionRun(title, folder, config, method, source, target, labelled, seen, classes, unit, seed)


def correct_loop(config: Mapping[str, Any]) -> dict[str, Any]:
    """Correct and classify.

    Parameters
    ----------
    config
        `{"run": CorrectionRun}`, as Ray Train passes it.

    Returns
    -------
    dict
        Facts: tiles, seconds; of a sphering that chose ε, `epsilon` and what each scored.
    """
    run: CorrectionRun = config["run"]
    begun = time.monotonic()
    known, wanted = embeddings_of(run.config, run.source), embeddings_of(run.config, run.target)
    inside = (wanted[run.unit[0]] == run.unit[1]).to_numpy()
    if run.method == "harmony":
        wanted, inside = wanted[inside], inside[inside]
    source, target, chosen = _corrected(run, *_sides(run, known, wanted, inside))
    codes = data.label_codes(run.labelled, list(run.classes))
    of_tile = pd.Series(codes, index=pd.MultiIndex.from_frame(run.labelled.frame[TILE_ID]))
    labels = of_tile.reindex(pd.MultiIndex.from_frame(known[TILE_ID])).fillna(-1).to_numpy(np.int64)
    probe = LinearProbe.fit(source[labels >= 0], labels[labels >= 0], len(run.classes))
    write_predictions(run.folder, wanted.filter(like="Metadata_"), run.classes, probe.probabilities(target), target)
    return {"tiles": len(wanted), "seconds": round(time.monotonic() - begun, 3), **chosen}


def _sides(run: CorrectionRun, known: pd.DataFrame, wanted: pd.DataFrame, inside: Mask) -> tuple[Side, Side]:
    """Say which images of the source and of the target count for what; the source's are those that training knows."""
    seen = pd.MultiIndex.from_frame(wanted[TILE_ID]).isin(pd.MultiIndex.from_frame(run.seen.frame[TILE_ID]))
    ours, theirs = (frame.filter(like=FEATURE).to_numpy(np.float32) for frame in (known, wanted))
    everywhere = np.ones(len(known), bool)
    return Side(known, ours, everywhere, everywhere), Side(wanted, theirs, seen, seen & inside)


def _corrected(run: CorrectionRun, source: Side, target: Side) -> tuple[Rows, Rows, dict[str, Any]]:
    """Correct the features of the source and of the target, each (N, D), and tell what was chosen on the way."""
    if run.method == "harmony":
        both = np.concatenate([source.features, target.features])
        batches = np.concatenate([side.named("Source", "Batch") for side in (source, target)])
        mixed = harmony(both, batches, seed=run.seed)
        return mixed[: len(source.features)], mixed[len(source.features) :], {}
    if run.method == "probe":
        return source.features, target.features, {}
    if run.method == "sphering":
        return _sphered(run, *(_scaled(run, side) for side in (source, target)))
    coral = Coral.fit(source.features[source.fitted], target.features[target.fitted])
    return coral.transform_source(source.features), coral.transform_target(target.features), {}


def _scaled(run: CorrectionRun, side: Side) -> Side:
    """Bring each plate to mean 0 and standard deviation 1, by `baselines.zscore`."""
    how = run.config.baselines.zscore
    if how == "none":
        return side
    reference = side.seen if how == "all" else side.seen & side.untreated
    other = "none" if how == "all" else "all (all images of a plate)"
    with _told(run.title, f"--baselines.zscore {other}, or leave the method out"):
        return side._replace(features=zscore_plates(side.features, side.named("Source", "Batch", "Plate"), reference))


def _sphered(run: CorrectionRun, source: Side, target: Side) -> tuple[Rows, Rows, dict[str, Any]]:
    """Whiten by the DMSO images, jointly or each side by its own, with the ε that is given or chosen."""
    settings, sides = run.config.baselines, (source, target)
    controls = [side.features[side.fitted & side.untreated] for side in sides]
    if settings.sphering == "joint":
        controls = [np.concatenate(controls)] * len(sides)
    if not all(map(len, controls)):
        raise ConfigError(
            f"{run.title}: no tile of it has {CONTROL} = {NEGATIVE_CONTROL}, so there is nothing to fit sphering on; ingest the "
            "plates with their compound tables, or leave the method out"
        )

    facts: dict[str, Any] = {}
    epsilon = settings.sphering_epsilon
    if epsilon == "auto":
        with _told(run.title, "give --baselines.sphering-epsilon a number, such as 1"):
            epsilon, facts = _choose_epsilon(controls, sides)
    ours, theirs = _whitened(controls, epsilon, [side.features for side in sides])
    return ours, theirs, facts


def _whitened(controls: Sequence[Rows], epsilon: float, features: Sequence[Rows]) -> list[Rows]:
    """Whiten the features of each side by controls."""
    return [Sphering.fit(own, regularisation=epsilon).transform(rows) for own, rows in zip(controls, features, strict=True)]


def _choose_epsilon(controls: Sequence[Rows], sides: Sequence[Side]) -> tuple[float, dict[str, Any]]:
    """Choose the ε with which the wells of both sides retrieve their compound in other batches best; no label is read."""
    wells = [_treated_wells(side) for side in sides]
    both = pd.concat(wells)
    if both.empty:
        raise ValueError("no well holds a known compound, by which ε could be chosen")
    compounds, batches = both[COMPOUND].to_numpy(), (both["Metadata_Source"] + "/" + both["Metadata_Batch"]).to_numpy()
    profiles = [one.filter(like=FEATURE).to_numpy(np.float32) for one in wells]
    scores = {
        epsilon: replicate_precision(np.concatenate(_whitened(controls, epsilon, profiles)), compounds, batches)
        for epsilon in EPSILONS
    }
    chosen = max(scores, key=lambda epsilon: scores[epsilon])
    return chosen, {"epsilon": chosen, "replicate_map": {str(epsilon): round(score, 4) for epsilon, score in scores.items()}}


def _treated_wells(side: Side) -> pd.DataFrame:
    """Average the features of each well that holds a known compound."""
    treated = side.fitted & (side.frame[COMPOUND].notna() & ~side.frame[CONTROL].isin(UNTREATED)).to_numpy()
    images = side.frame[treated].filter(like="Metadata_")
    features = pd.DataFrame(side.features[treated], images.index, [f"{FEATURE}{i:04d}" for i in range(side.features.shape[1])])
    return well_profiles(pd.concat([images, features], axis=1))


@contextmanager
def _told(title: str, remedy: str) -> Iterator[None]:
    """Name the stage and the remedy where the data lack something."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{title}: {error}; {remedy}") from None
