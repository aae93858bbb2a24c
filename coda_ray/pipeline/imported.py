"""A model that came as an exported folder: as finished stages, so that it is adapted without a tile of its source."""

import json
from typing import Any

import torch
from torch import Tensor

from coda_ray.config import Config, ConfigError
from coda_ray.jump.prepare import preparation_of
from coda_ray.learn.exported import ADAPTATION, DESCRIPTION, WEIGHTS, ExportedModel, Start, unpack, unpack_start
from coda_ray.learn.moments import Moments
from coda_ray.learn.vit import spec_of
from coda_ray.methods import ROWS, Method, row_of
from coda_ray.pipeline.moments import SUMS
from coda_ray.pipeline.request import Model
from coda_ray.pipeline.stage import Stage, finish, not_run
from coda_ray.storage import Folder, open_place
from coda_ray.training.checkpoints import write_result

KIND = "imported"


def import_model(config: Config, address: str, method: Method) -> tuple[Config, Model]:
    """Read an exported model, and lay it into the results as stages that are finished.

    Parameters
    ----------
    config
        Settings; S3 is reached as results are.
    address
        A folder of `jobs/export.py`, of a dual model as its source gave it.
    method
        What is to be done with it.

    Returns
    -------
    config
        With the network, the sizes of the views and of DINO's heads that the model has.
    model
        The model; its source's tiles are not needed.

    Raises
    ------
    ConfigError
        When there is no such model, it cannot be adapted, or `split` or `learn_from` asks for the source's compounds.
    ModelError
        When it is damaged, or tiles are prepared otherwise here.
    """
    folder = open_place(config.results.model_copy(update={"address": address}))
    try:
        exported = unpack(folder.read(DESCRIPTION), folder.read(WEIGHTS), folder.address())
        start = unpack_start(exported, folder.read(ADAPTATION))
    except FileNotFoundError as error:
        raise ConfigError(f"{folder.address()}: {error}; give a folder that jobs/export.py wrote of a dual model") from None
    exported.require(config.ingest.channels, preparation_of(config), config.tiles.address)
    for name, given, without in (("split", config.split, "plate"), ("learn_from", config.learn_from, "all")):
        if given != without:
            option = f"--{name.replace('_', '-')} {without}"
            raise ConfigError(f"{name} = {given!r}: which compounds these are is read from the source's tiles; give {option}")
    has, row = exported.description["origin"]["method"], row_of(method)
    if (row.model or config.baselines.model) != has or not (row.trains or method in (has, "standardise")):
        raise ConfigError(
            f"method = {method!r}: {folder.address()} holds a {has}, and images of its source are not at hand; give one of "
            f"{', '.join(other.name for other in ROWS if other.trains and other.model == has)}"
        )
    return _as_it_was_trained(config, exported, start), _stages(config, exported, start)


def _as_it_was_trained(config: Config, exported: ExportedModel, start: Start) -> Config:
    """Take the sizes of the networks and of the views from the model."""
    spec, view, head = spec_of(exported.description["timm"]), exported.description["view"], start.head
    values, sizes = config.model_dump(), {name: getattr(spec, name) for name in ("patch", "width", "depth", "heads")}
    values["model"] |= {"arch": spec.name, "init": "random"} | {name: size for name, size in sizes.items() if size is not None}
    values["views"] |= {"tile_crop": view["tile_crop"], "size_global": view["size"]}
    values["dino"] |= {"head_hidden": head["hidden"], "head_bottleneck": head["bottleneck"], "out_dim": head["out_dim"]}
    return type(config).model_validate(values)


def _stages(config: Config, exported: ExportedModel, start: Start) -> Model:
    """Write what the folder holds as stages: the pre-training, the classifier, and the moments of the tokens."""
    results, origin = open_place(config.results), exported.description["origin"]
    method, source = origin["method"], origin["source"]
    common = {"model": exported.key, "source": source, "seed": origin["seed"]}
    named = f"{method} of {source}, model {exported.key}"
    extractor = _finished(results, f"extractor of {named}", {**common, "objective": row_of(method).loss}, (), start.dino)
    state = {f"model.{name}": value for name, value in exported.network.state_dict().items()}
    classifier = _finished(results, named, {**common, "classes": exported.classes}, (extractor,), state)
    moments = None
    if start.moments is not None:
        of = {**common, "what": "moments"}
        moments = _finished(results, f"moments of {named} on its source", of, (classifier,), _sums(start.moments), SUMS)
    shares = None if start.prior is None else tuple(start.prior.tolist())
    return Model(method, classifier, extractor, imported=True, moments=moments, shares=shares)


def _sums(moments: Moments) -> dict[str, Tensor]:
    """Write moments as the sums over one image that has them."""
    mean, std = moments.mean.double(), moments.std.double()
    return {"sums": torch.stack([mean, std.square() + mean.square()])[None], "count": torch.ones(1, dtype=torch.float64)}


def _finished(
    results: Folder,
    title: str,
    inputs: dict[str, Any],
    needs: tuple[Stage, ...],
    tensors: "dict[str, Tensor] | Any",
    file: str = "model.safetensors",
) -> Stage:
    """Write a stage that is finished, unless it is there."""
    stage = Stage(KIND, title, inputs, not_run, needs)
    if stage.facts(results) is None:
        folder = results.child(stage.path)
        note = {"stage": KIND, "key": stage.key, "title": title, "inputs": inputs, "needs": [need.path for need in needs]}
        folder.write("stage.json", json.dumps(note, indent=1).encode())
        finish(folder, {**write_result(folder, file, dict(tensors)), "plates": [inputs["source"]]})
    return stage
