"""ODA, CODA and ODA-MAE: the pre-training of the feature extractor goes on with the target's images (CODA, section 3)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from coda_ray.config import Config, Granularity, Optimisation
from coda_ray.methods import Loss, MethodRow, trained_by
from coda_ray.pipeline import data
from coda_ray.pipeline.request import Model
from coda_ray.pipeline.stage import Stage
from coda_ray.pipeline.train_stages import (
    epoch_counted,
    make_run,
    named,
    paused,
    root_of,
    section_of,
    self_supervised_work,
    training_inputs,
    training_workload,
)
from coda_ray.training.loop import Work


@dataclass(frozen=True)
class Added:
    """What a method adds to the pre-training that goes on.

    Parameters
    ----------
    row
        The method.
    inputs
        What decides its result, besides.
    needs
        Stages that it reads, besides.
    wrap
        Given the objective of the pre-training and the number of channels, makes its own, on the worker.
    """

    row: MethodRow
    inputs: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[Stage, ...] = ()
    wrap: Callable[[Work, int], Work] | None = None


def adapt(
    config: Config,
    model: Model,
    target: str,
    *,
    granularity: Granularity,
    unit: str,
    seed: int,
    until: int | None = None,
    start: Stage | None = None,
    added: Added | None = None,
) -> Stage:
    """Plan label-free adaptation of the feature extractor to one unit of a target (CODA, section 3).

    The objective of the pre-training goes on with all its weights (of DINO: student, teacher and both heads), or with those
    that another adaptation left; optimizer, schedules and centre start anew. The number of steps is the same at every
    granularity: an epoch counts the tiles of the whole target.

    Parameters
    ----------
    config
        Settings; `adapt.dino` overrides `dino`.
    model
        The unadapted model; its pre-training goes on.
    target, granularity, unit
        What is adapted to.
    seed
        Seed of samples and views.
    until
        The state after so many of the steps, as a stage of its own; the whole adaptation goes on from there.
    start
        An adaptation of the same pre-training that this one goes on from; None starts from the pre-training itself.
    added
        What another method adds; None only goes on.

    Raises
    ------
    DataError
        When tiles have no partner and `adapt.no_partner` is `error`.
    ValueError
        When `start` adapts another pre-training.
    """
    pretrained = model.pretrained
    if start is not None and root_of(start).key != pretrained.key:
        raise ValueError(f"{start.title}: it adapts another model than {pretrained.title}; start from an adaptation of this one")
    begun = start or pretrained
    config = config.model_copy(update={"dino": config.adapting})
    loss: Loss = pretrained.inputs["objective"]
    added = added or Added(trained_by(loss))
    source, pairs = pretrained.inputs["source"], added.row.pairs
    tiles = data.adaptation_tiles(config, source, target, granularity, unit)
    after = f", after {start.inputs['granularity']} {start.inputs['unit']}" if start else ""
    title = f"adapt {added.row.name} {source} to {target} {granularity} {unit}{after}, {named(config, seed, on_target=True)}"
    note = tiles.check_partners(config, title, adapting=True) if pairs else None
    optimisation = config.adapt
    if granularity != "source" and optimisation.minibatch_unit:
        optimisation = optimisation.model_copy(update={"minibatch": optimisation.minibatch_unit})
    inputs = {
        **training_inputs(config, optimisation, seed, section_of(loss)),
        "target": target,
        "granularity": granularity,
        "unit": unit,
        "tiles": tiles.fingerprints,
        **added.inputs,
    }
    epoch = len(data.known_tiles(config, source, target)) // config.adapt.minibatch
    if config.adapt.partner_pool == "unit":
        inputs |= epoch_counted(epoch, optimisation, config.dino if loss != "mae" else None)
    build = partial(_work, config, tiles, optimisation, epoch, seed, loss, pairs, begun, added.wrap)
    make = partial(make_run, config, optimisation, epoch, seed, title, build)
    workload = training_workload(str(added.row.rate), tiles.anchored(), optimisation, epoch, pairs=pairs)
    whole = Stage("adapt", title, inputs, make, (begun, *added.needs), workload, note=note)
    return whole if until is None else paused(config, whole, until)


def _work(
    config: Config,
    tiles: data.UnlabelledTiles,
    optimisation: Optimisation,
    epoch: int,
    seed: int,
    loss: Loss,
    pairs: bool,
    begun: Stage,
    wrap: Callable[[Work, int], Work] | None,
) -> Work:
    """Build the pre-training on the worker, and what a method makes of it."""
    work = self_supervised_work(config, tiles, optimisation, epoch, seed, loss, begun, None, pairs=pairs)
    return wrap(work, len(tiles.pool.channels)) if wrap else work
