"""Transfers: which stages a method needs from one source to one target, and the scores at the end."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from coda_ray.analysis.metrics import image_scores, well_scores
from coda_ray.config import Config, Granularity, Method
from coda_ray.pipeline import data
from coda_ray.pipeline.evaluate import PROBABILITY, evaluate, predictions_of
from coda_ray.pipeline.stage import Stage
from coda_ray.pipeline.train_stages import adapt, classify, pretrain
from coda_ray.storage import Folder
from coda_ray.tiles.store import LABEL, UNIT_COLUMNS, TileIndex, content_key

UNADAPTED: dict[Method, Method] = {"oda": "dual-dino", "coda": "dual-cb"}
TILE_ID = ["Metadata_Source", "Metadata_Batch", "Metadata_Plate", "Metadata_Well", "Metadata_Site"]


@dataclass(frozen=True)
class Request:
    """One cell of the result matrix for one seed; an adapting method brings its unadapted model along."""

    source: str
    target: str
    method: Method
    granularity: Granularity
    seed: int


@dataclass(frozen=True)
class Transfer:
    """One score to be computed: some rows of an evaluation.

    Parameters
    ----------
    identity
        source, target, method, granularity, unit, scope, seed.
    evaluation
        The stage whose predictions are scored.
    trained
        The adaptation that made the model; None for an unadapted one.
    index
        The labelled tiles that count; none where the target has no labels, and then there is no score.
    classes
        MoA labels, in the order of the classifier.
    """

    identity: dict[str, Any]
    evaluation: Stage
    trained: Stage | None
    index: TileIndex
    classes: tuple[str, ...]

    @cached_property
    def key(self) -> str:
        """Hash of everything that decides the score, the labels among it."""
        return content_key({**self.identity, "evaluation": self.evaluation.key, "tiles": self.index.fingerprint})


def plan(config: Config, request: Request) -> list[Transfer]:
    """Plan the stages and transfers of one request.

    Parameters
    ----------
    config
        Settings.
    request
        Source, target, method, granularity, seed. With source = target the model is scored on the held-out plate.

    Returns
    -------
    list of Transfer
        The unadapted model's first; for a granularity below `source`, per unit, on the unit itself and on the whole target.

    Raises
    ------
    DataError
        When tiles, labels or partners are not there.
    """
    model = UNADAPTED.get(request.method, request.method)
    extractor = None
    if model != "supervised":
        extractor = pretrain(config, request.source, cross_batch=model == "dual-cb", seed=request.seed)
    classifier = classify(config, request.source, seed=request.seed, extractor=extractor)
    if request.source == request.target:
        return [_in_domain(config, request, model, classifier)]
    index = data.load_tiles(config, request.target)
    labelled = _scorable(index, classifier)
    base = evaluate(config, index, request.target, classifier)
    found = [_transfer(request, model, "source", request.target, "whole", base, None, labelled)]
    if extractor is None or request.method not in UNADAPTED:
        return found
    granularity = request.granularity
    for unit in index.units(granularity):
        adapted = adapt(config, extractor, request.target, granularity=granularity, unit=unit, seed=request.seed)
        after = evaluate(config, index, request.target, classifier, adapted)
        found.append(_transfer(request, request.method, granularity, unit, "whole", after, adapted, labelled))
        if granularity != "source":
            inside = labelled.unit(granularity, unit)
            found.append(_transfer(request, model, granularity, unit, "adapted", base, None, inside))
            found.append(_transfer(request, request.method, granularity, unit, "adapted", after, adapted, inside))
    return found


def stages_of(transfers: Iterable[Transfer]) -> list[Stage]:
    """List every stage once, each after those it needs."""
    ordered: dict[str, Stage] = {}

    def visit(stage: Stage) -> None:
        if stage.key not in ordered:
            for need in stage.needs:
                visit(need)
            ordered[stage.key] = stage

    for transfer in transfers:
        visit(transfer.evaluation)
    return list(ordered.values())


def score(config: Config, results: Folder, transfers: Iterable[Transfer]) -> Iterator[dict[str, Any]]:
    """Score the transfers of one finished evaluation; labels are read here and nowhere before.

    Transfers without a labelled tile are passed over.

    Yields
    ------
    dict
        The transfer's record: its identity, counts, scores, steps, seconds, key and where its curve is.
    """
    table, evaluation = None, ""
    for transfer in transfers:
        if not len(transfer.index):
            continue
        if table is None or transfer.evaluation.key != evaluation:
            table, evaluation = predictions_of(config, transfer.evaluation).set_index(TILE_ID), transfer.evaluation.key
        frame = transfer.index.frame
        known = frame[frame.set_index(TILE_ID).index.isin(table.index)]
        chosen = table.loc[list(known[TILE_ID].itertuples(index=False, name=None))]
        probabilities = chosen[[f"{PROBABILITY}{name}" for name in transfer.classes]].to_numpy(np.float64)
        labels = data.label_codes(TileIndex(known, transfer.index.folder, ()), list(transfer.classes))
        wells = (known["Metadata_Plate"] + "/" + known["Metadata_Well"]).to_numpy(str)
        facts = (transfer.trained.facts(results) or {}) if transfer.trained else {}
        yield {
            **transfer.identity,
            "n_images": len(known),
            "n_wells": len(np.unique(wells)),
            **image_scores(labels, probabilities),
            **well_scores(wells, labels, probabilities),
            "steps": facts.get("steps", 0),
            "seconds": facts.get("seconds", 0.0),
            "key": transfer.key,
            "history": transfer.trained.path if transfer.trained else None,
        }


def _in_domain(config: Config, request: Request, model: Method, classifier: Stage) -> Transfer:
    """Score the unadapted model on its source's held-out plate."""
    index = data.held_out_tiles(config, request.source)
    plate = str(index.frame[UNIT_COLUMNS["plate"]].iloc[0])
    evaluation = evaluate(config, index, f"{request.source}'s held-out plate {plate}", classifier)
    return _transfer(request, model, "plate", plate, "adapted", evaluation, None, _scorable(index, classifier))


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
        "seed": request.seed,
    }
    classifier = evaluation.needs[0]
    return Transfer(identity, evaluation, trained, index, tuple(classifier.inputs["classes"]))


def _scorable(index: TileIndex, classifier: Stage) -> TileIndex:
    """Keep the tiles whose MoA the classifier knows."""
    return index.where(index.frame[LABEL].isin(classifier.inputs["classes"]))
