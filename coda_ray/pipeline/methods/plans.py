"""Which module plans which method: what is trained on the target, and what is done to a model or to its features without."""

from dataclasses import dataclass
from functools import partial
from typing import Protocol

from coda_ray.config import Config, Granularity
from coda_ray.methods import Method
from coda_ray.pipeline.evaluate import evaluate
from coda_ray.pipeline.methods.continued import adapt
from coda_ray.pipeline.methods.corrections import Correction, corrected
from coda_ray.pipeline.methods.shot import shot
from coda_ray.pipeline.methods.standardise import own_and_wanted
from coda_ray.pipeline.methods.tent import tent
from coda_ray.pipeline.request import Model, Request
from coda_ray.pipeline.stage import Stage
from coda_ray.tiles.store import TileIndex


@dataclass(frozen=True)
class Fit:
    """What a method is fitted to, and on what it is asked.

    Parameters
    ----------
    index
        The target's tiles.
    before
        Evaluation of the unadapted model on them.
    granularity, unit
        The unit.
    """

    index: TileIndex
    before: Stage
    granularity: Granularity
    unit: str


class Train(Protocol):
    """Plans the training of a model on one unit of a target."""

    def __call__(
        self,
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
        """Plan it, or its state after `until` steps; `start` is an adaptation of the same model that it goes on from."""


class Treat(Protocol):
    """Plans the evaluation of a model, or of its features, that nothing is trained for on the target."""

    def __call__(self, config: Config, request: Request, model: Model, fit: Fit) -> Stage:
        """Plan it."""


def _correct(method: Correction, config: Config, request: Request, model: Model, fit: Fit) -> Stage:
    return corrected(config, method, request, model, fit.before, granularity=fit.granularity, unit=fit.unit)


def _standardise(config: Config, request: Request, model: Model, fit: Fit) -> Stage:
    moved = own_and_wanted(config, model, request.target)
    return evaluate(config, fit.index, request.target, model.classifier, standardised=moved)


def _ttt(config: Config, request: Request, model: Model, fit: Fit) -> Stage:
    return evaluate(config, fit.index, request.target, model.classifier, autoencoder=model.pretrained, seed=request.seed)


TRAINED: dict[Method, Train] = {
    "oda-mae": adapt,
    "oda": adapt,
    "coda": adapt,
    "moments": partial(shot, "moments"),
    "shot": partial(shot, "shot"),
    "oda-shot": partial(shot, "oda-shot"),
    "coda-shot": partial(shot, "coda-shot"),
    "tent": tent,
}
TREATED: dict[Method, Treat] = {
    "ttt": _ttt,
    "probe": partial(_correct, "probe"),
    "standardise": _standardise,
    "sphering": partial(_correct, "sphering"),
    "coral": partial(_correct, "coral"),
    "harmony": partial(_correct, "harmony"),
}


def adaptation(
    config: Config, request: Request, model: Model, granularity: Granularity, unit: str, until: int | None = None
) -> Stage:
    """Plan the training of a model on one unit of the request's target, or its state after `until` steps."""
    train = TRAINED[request.method]
    return train(config, model, request.target, granularity=granularity, unit=unit, seed=request.seed, until=until)


def treated(config: Config, request: Request, model: Model, fit: Fit) -> tuple[Stage, Stage | None]:
    """Plan what a method does to a model, or to its features, for one unit.

    Returns
    -------
    tuple
        The evaluation, and the training behind it; None where there is none.
    """
    if request.method in TREATED:
        return TREATED[request.method](config, request, model, fit), None
    trained = adaptation(config, request, model, fit.granularity, fit.unit)
    return answers(config, model, request.target, fit.index, request.target, trained), trained


def answers(config: Config, model: Model, target: str, index: TileIndex, what: str, trained: Stage | None) -> Stage:
    """Plan the predictions of a model for some tiles of a target.

    Parameters
    ----------
    config
        Settings; `adapt.standardise` counts for a model that was trained on the target.
    model
        The unadapted model.
    target
        The target.
    index, what
        The tiles, and their name for people.
    trained
        Its training on the target; None for the model as it is.
    """
    moved = None
    if trained is not None and config.adapt.standardise == "after":
        moved = own_and_wanted(config, model, target, trained)
    return evaluate(config, index, what, model.classifier, trained, standardised=moved)
