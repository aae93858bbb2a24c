"""Tent: the norms of a whole model, moved by the entropy of its predictions (Wang et al., ICLR 2021)."""

from functools import partial

from coda_ray.config import Config, Granularity
from coda_ray.learn.tent import TentObjective
from coda_ray.pipeline import data, networks
from coda_ray.pipeline.request import Model
from coda_ray.pipeline.stage import Stage
from coda_ray.pipeline.train_stages import (
    epoch_counted,
    load_model,
    make_run,
    named,
    paused,
    training_inputs,
    training_workload,
)
from coda_ray.training.loop import Work


def tent(
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
    """Plan entropy minimisation on one unit of a target (Wang et al., ICLR 2021): norms of the whole model, no label.

    Raises
    ------
    ValueError
        With a `start`: what one adaptation left is no model that Tent could go on from.
    """
    if start is not None:
        raise ValueError(f"{start.title}: tent starts from a model of the source alone")
    classifier = model.classifier
    source = classifier.inputs["source"]
    tiles = data.adaptation_tiles(config, source, target, granularity, unit)
    title = f"adapt tent {source} to {target} {granularity} {unit}, {named(config, seed, on_target=True)}"
    inputs = {
        **training_inputs(config, config.tent, seed),
        "objective": "tent",
        "target": target,
        "granularity": granularity,
        "unit": unit,
        "tiles": tiles.fingerprints["anchors"],
    }
    epoch = len(data.known_tiles(config, source, target)) // config.tent.minibatch
    if granularity != "source":
        inputs |= epoch_counted(epoch, config.tent)
    build = partial(_tent_work, config, tiles, classifier, seed)
    make = partial(make_run, config, config.tent, epoch, seed, title, build)
    workload = training_workload("tent", tiles.anchored(), config.tent, epoch)
    whole = Stage("adapt", title, inputs, make, (classifier,), workload)
    return whole if until is None else paused(config, whole, until)


def _tent_work(config: Config, tiles: data.UnlabelledTiles, classifier: Stage, seed: int) -> Work:
    """Build Tent on the worker, from a finished labelled stage."""
    model = load_model(config, classifier, None, len(tiles.pool.channels))
    return Work(
        TentObjective(model, recipe=networks.recipe(config)), tiles.source(seed=seed, crop=config.views.tile_crop, pairs=None)
    )
