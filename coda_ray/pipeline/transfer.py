"""Transfers: which stages a method needs from one source to one target, and the scores at the end."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from coda_ray.analysis.intervals import bootstrap_accuracy
from coda_ray.analysis.metrics import compound_scores, image_scores, well_scores
from coda_ray.config import POOL, Config, Granularity, check_pair
from coda_ray.methods import Method, row_of
from coda_ray.pipeline import data
from coda_ray.pipeline.evaluate import PROBABILITY, TILE_ID, evaluate, predictions_of
from coda_ray.pipeline.methods.plans import Fit, treated
from coda_ray.pipeline.profile import profile
from coda_ray.pipeline.request import Model, Request
from coda_ray.pipeline.stage import Stage, with_needs
from coda_ray.pipeline.train_stages import classify, pretrain
from coda_ray.storage import Folder
from coda_ray.tiles.store import COMPOUND, TileIndex, content_key
from coda_ray.tracking.records import FEATURE_SCORES, INTERVAL

BOOTSTRAP_SEED = 0


@dataclass(frozen=True)
class Transfer:
    """One score to be computed: some rows of an evaluation.

    Parameters
    ----------
    identity
        source, target, method, granularity, unit, scope, split, seed.
    evaluation
        The stage whose predictions are scored.
    trained
        The adaptation that made the model; None for an unadapted one.
    index
        The labelled tiles that count; none where the target has no labels, and then there is no score.
    profile
        The stage that measures the features; None where that is not wanted, or the transfer is scored on a part of the
        evaluated tiles.
    """

    identity: dict[str, Any]
    evaluation: Stage
    trained: Stage | None
    index: TileIndex
    profile: Stage | None = None

    @property
    def last(self) -> Stage:
        """The stage after which it can be scored."""
        return self.profile or self.evaluation

    @cached_property
    def key(self) -> str:
        """Hash of everything that decides the score, the labels among it."""
        return content_key({**self.identity, "evaluation": self.last.key, "tiles": self.index.fingerprint})


def unadapted(config: Config, method: Method) -> Method:
    """Name the model that a method starts from; itself, where it adapts nothing."""
    return row_of(method).model or config.baselines.model


def plan(config: Config, request: Request, model: Model | None = None) -> list[Transfer]:
    """Plan the stages and transfers of one request.

    Parameters
    ----------
    config
        Settings.
    request
        Source, target, method, granularity, seed, split. With source = target the model is scored on the held-out plate; a
        pool, on those of all its labs.
    model
        The model that the method starts from, where it was imported; None plans it from the source's tiles.

    Returns
    -------
    list of Transfer
        The unadapted model's first; of a method that is fitted to units, at a granularity below `source`, per unit, on the
        unit itself and on the whole target.

    Raises
    ------
    ConfigError
        As `check_pair`; DataError, when tiles, labels or partners are not there.
    """
    check_pair(request.source, request.target)
    config = config.model_copy(update={"split": request.split})
    model = model or model_of(config, request)
    if request.source == request.target:
        return [_in_domain(config, request, model)]
    index = data.load_tiles(config, request.target)
    counted = data.scored(config, request.source, index, model.classifier.inputs["classes"])
    base = evaluate(config, index, request.target, model.classifier)
    whole = partial(_on_the_whole, config, request, index, counted)
    found = [whole(model.method, "source", request.target, base, None)]
    if request.method == model.method:
        return found
    row = row_of(request.method)
    if not row.per_unit:
        after, _ = treated(config, request, model, Fit(index, base, "source", request.target))
        return [*found, whole(request.method, "source", request.target, after, None)]
    granularity = request.granularity
    for unit in data.units_of(config, request.target, granularity, request.seed):
        after, trained = treated(config, request, model, Fit(index, base, granularity, unit))
        if granularity == "source" or row.beyond_unit:
            found.append(whole(request.method, granularity, unit, after, trained))
        if granularity != "source":
            inside = counted.unit(granularity, unit)
            found.append(_transfer(request, model.method, granularity, unit, "adapted", base, None, inside))
            found.append(_transfer(request, request.method, granularity, unit, "adapted", after, trained, inside))
    return found


def model_of(config: Config, request: Request) -> Model:
    """Plan the model that a method starts from."""
    row, extractor = row_of(unadapted(config, request.method)), None
    if row.loss:
        extractor = pretrain(config, request.source, objective=row.loss, seed=request.seed)
    return Model(row.name, classify(config, request.source, seed=request.seed, extractor=extractor), extractor)


def stages_of(transfers: Iterable[Transfer]) -> list[Stage]:
    """List every stage of some transfers once, each after those it needs."""
    return with_needs(transfer.last for transfer in transfers)


def score(config: Config, results: Folder, transfers: Iterable[Transfer]) -> Iterator[dict[str, Any]]:
    """Score the transfers of one finished evaluation; labels are read here and nowhere before.

    Transfers without a labelled tile that could be read are passed over.

    Yields
    ------
    dict
        The transfer's record: its identity, counts, scores, the accuracy's 95 % interval over wells (null with a single well),
        scores of the features (null where not measured), steps, seconds, key and where its curve is.
    """
    table, evaluation = None, ""
    for transfer in transfers:
        if not len(transfer.index):
            continue
        if table is None or transfer.evaluation.key != evaluation:
            table, evaluation = predictions_of(config, transfer.evaluation).set_index(TILE_ID), transfer.evaluation.key
        frame = transfer.index.frame
        known = frame[frame.set_index(TILE_ID).index.isin(table.index)]
        if known.empty:
            continue
        chosen = table.loc[list(known[TILE_ID].itertuples(index=False, name=None))]
        named = chosen.filter(like=PROBABILITY)
        classes, probabilities = [str(name).removeprefix(PROBABILITY) for name in named], named.to_numpy(np.float64)
        labels = data.label_codes(TileIndex(known, transfer.index.folder, ()), classes)
        wells = (known["Metadata_Source"] + "/" + known["Metadata_Plate"] + "/" + known["Metadata_Well"]).to_numpy(str)
        compounds = known[COMPOUND].to_numpy(str)
        n_wells, right = len(np.unique(wells)), probabilities.argmax(1) == labels
        interval = bootstrap_accuracy(wells, right, seed=BOOTSTRAP_SEED) if n_wells > 1 else (None, None)
        facts = (transfer.trained.facts(results) or {}) if transfer.trained else {}
        measured = (transfer.profile.facts(results) or {}) if transfer.profile else {}
        yield {
            **transfer.identity,
            "n_images": len(known),
            "n_wells": n_wells,
            "n_compounds": len(np.unique(compounds)),
            **image_scores(labels, probabilities),
            **well_scores(wells, labels, probabilities),
            **compound_scores(compounds, labels, probabilities),
            **dict(zip(INTERVAL, interval, strict=True)),
            **{name: measured.get("scores", {}).get(name) for name in FEATURE_SCORES},
            "steps": facts.get("steps", 0),
            "seconds": facts.get("seconds", 0.0),
            "key": transfer.key,
            "history": transfer.trained.path if transfer.trained else None,
        }


def _on_the_whole(
    config: Config,
    request: Request,
    index: TileIndex,
    counted: TileIndex,
    method: Method,
    granularity: Granularity,
    unit: str,
    evaluation: Stage,
    trained: Stage | None,
) -> Transfer:
    """Name one score on all of the target; its features are measured too, where that is wanted."""
    transfer = _transfer(request, method, granularity, unit, "whole", evaluation, trained, counted)
    if not config.evaluate.profiles:
        return transfer
    return replace(transfer, profile=profile(config, data.unseen(config, request.source, index), evaluation))


def _in_domain(config: Config, request: Request, model: Model) -> Transfer:
    """Score the unadapted model on its source's held-out plate, or on those of all labs of a pool."""
    index, plates = data.held_out_tiles(config, request.source), data.held_out_plates(config, request.source)
    plate = POOL.join(plates.values() if len(plates) == 1 else map("/".join, plates.items()))
    evaluation = evaluate(config, index, f"{request.source}'s held-out plate {plate}", model.classifier)
    counted = data.scored(config, request.source, index, model.classifier.inputs["classes"])
    return _transfer(request, model.method, "plate", plate, "adapted", evaluation, None, counted)


def _transfer(
    request: Request,
    method: Method,
    granularity: Granularity,
    unit: str,
    scope: str,
    evaluation: Stage,
    trained: Stage | None,
    index: TileIndex,
) -> Transfer:
    """Name one score."""
    identity = {
        "source": request.source,
        "target": request.target,
        "method": method,
        "granularity": granularity,
        "unit": unit,
        "scope": scope,
        "split": request.split,
        "seed": request.seed,
    }
    return Transfer(identity, evaluation, trained, index)
