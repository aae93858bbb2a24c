"""ODA, CODA and ODA-MAE: the pre-training of the feature extractor goes on with the target's images (CODA, section 3)."""

from functools import partial

from coda_ray.config import Config, Granularity
from coda_ray.methods import Loss, trained_by
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
    objective: Loss = pretrained.inputs["objective"]
    source = pretrained.inputs["source"]
    tiles = data.adaptation_tiles(config, source, target, granularity, unit)
    after = f", after {start.inputs['granularity']} {start.inputs['unit']}" if start else ""
    title = f"adapt {trained_by(objective).name} {source} to {target} {granularity} {unit}{after}, {named(config, seed)}"
    note = tiles.check_partners(config, title, adapting=True) if objective == "dino-cb" else None
    optimisation = config.adapt
    if granularity != "source" and optimisation.minibatch_unit:
        optimisation = optimisation.model_copy(update={"minibatch": optimisation.minibatch_unit})
    inputs = {
        **training_inputs(config, optimisation, seed, section_of(objective)),
        "target": target,
        "granularity": granularity,
        "unit": unit,
        "tiles": tiles.fingerprints,
    }
    epoch = len(data.known_tiles(config, source, target)) // config.adapt.minibatch
    if config.adapt.partner_pool == "unit":
        inputs |= epoch_counted(epoch, optimisation, config.dino if objective != "mae" else None)
    build = partial(self_supervised_work, config, tiles, optimisation, epoch, seed, objective, begun, None)
    make = partial(make_run, config, optimisation, epoch, seed, title, build)
    workload = training_workload(section_of(objective), tiles.anchored(), optimisation, epoch, pairs=objective == "dino-cb")
    whole = Stage("adapt", title, inputs, make, (begun,), workload, note=note)
    return whole if until is None else paused(config, whole, until)
