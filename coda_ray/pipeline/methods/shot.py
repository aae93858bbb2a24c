"""`coda-shot`, `oda-shot`, `shot`, `moments`: the extractor is trained on the target through the frozen classifier.

What it needs of the source travels with the model: weights, heads, classifier, moments of the tokens, shares of the classes.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch

from coda_ray.config import Config, ConfigError, Granularity
from coda_ray.learn.dual import DualModel
from coda_ray.learn.objectives import DinoObjective
from coda_ray.learn.shot import SourceFreeObjective, Terms
from coda_ray.methods import Method, MethodRow, row_of
from coda_ray.pipeline import data
from coda_ray.pipeline.methods.continued import Added, adapt
from coda_ray.pipeline.methods.standardise import moments_on_source
from coda_ray.pipeline.moments import moments_of_all
from coda_ray.pipeline.request import Model
from coda_ray.pipeline.stage import Stage
from coda_ray.pipeline.train_stages import load_model
from coda_ray.tiles.store import LABEL
from coda_ray.training.loop import Work


def shot(
    method: Method,
    config: Config,
    model: Model,
    target: str,
    *,
    granularity: Granularity,
    unit: str,
    seed: int,
    until: int | None = None,
    start: Stage | None = None,
) -> Stage:
    """Plan the adaptation of a feature extractor through its frozen classifier; see `adapt` and `learn.shot`.

    Parameters
    ----------
    method
        One of those with terms.
    config
        Settings; `shot` weighs the terms.
    model, target, granularity, unit, seed, until, start
        As for `adapt`.
    """
    row = row_of(method)
    terms = terms_of(config, row)
    anchor = moments_on_source(config, model, data.pretraining_tiles) if terms.moments > 0 else None
    prior = class_shares(config, model) if terms.diversity > 0 and config.shot.prior == "source" else None
    used = {name: value for name, value in vars(terms).items() if name in row.terms}
    if {"entropy", "diversity"} & set(row.terms):
        used["margin"] = terms.margin
    inputs: dict[str, Any] = {"objective": row.objective, "terms": used} | ({"prior": prior} if prior else {})
    needs = (model.classifier, anchor) if anchor else (model.classifier,)
    wrap = partial(_through, config, terms, model.classifier, anchor, prior)
    added = Added(row, inputs, needs, wrap)
    return adapt(config, model, target, granularity=granularity, unit=unit, seed=seed, until=until, start=start, added=added)


def terms_of(config: Config, row: MethodRow) -> Terms:
    """Weigh the terms that a method uses; the others have weight 0. Raises `ConfigError` when none is left."""
    weights = config.shot.model_dump(include={"dino", "entropy", "diversity", "consistency", "moments"})
    used = {name: weight if name in row.terms else 0.0 for name, weight in weights.items()}
    try:
        return Terms(**used, margin=config.shot.margin)
    except ValueError as error:
        raise ConfigError(f"{row.name}: {error}") from None


def class_shares(config: Config, model: Model) -> list[float]:
    """Share of each class among the images that a model's classifier was trained on, in the order of its classes.

    Raises
    ------
    ConfigError
        When the model came without.
    """
    known = model.classifier.inputs
    if not model.imported:
        return shares_of(config, known["source"], known["classes"])
    if model.shares is None:
        raise ConfigError(
            f"shot.prior = 'source': {model.classifier.title} was exported without the shares of its classes; "
            "give --shot.prior uniform"
        )
    return list(model.shares)


def shares_of(config: Config, source: str, classes: Sequence[str]) -> list[float]:
    """Share of each class among a source's training images; labels of the source are read."""
    shares = data.training_tiles(config, source).labelled().frame[LABEL].value_counts(normalize=True)
    return [float(shares.get(name, 0.0)) for name in classes]


def _through(
    config: Config, terms: Terms, classifier: Stage, anchor: Stage | None, prior: list[float] | None, work: Work, channels: int
) -> Work:
    """Put the frozen classifier on the pre-training's student; without DINO there is no teacher output to guard."""
    model = load_model(config, classifier, None, channels)
    if not isinstance(model, DualModel):
        raise TypeError(f"{classifier.title}: only a dual model has a feature extractor that can be adapted")
    objective = SourceFreeObjective(
        cast(DinoObjective, work.objective),
        model,
        terms,
        source=moments_of_all(config, anchor) if anchor else None,
        prior=None if prior is None else torch.tensor(prior),
    )
    return replace(work, objective=objective, guard=work.guard if terms.dino > 0 else None)
