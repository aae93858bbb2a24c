"""The stage that looks: a model over every tile of a source, predictions and embeddings to parquet, no label read."""

import io
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import ray.train
import ray.train.torch
import torch
from ray.train.collective import barrier
from torch import Tensor

from coda_ray.config import Config
from coda_ray.learn.dual import DualModel
from coda_ray.learn.precision import choose_precision
from coda_ray.learn.supervised import SupervisedModel
from coda_ray.pipeline import networks
from coda_ray.pipeline.stage import Stage, Workload
from coda_ray.pipeline.train_stages import Made, stage_tensors, teacher_of
from coda_ray.storage import Folder, open_place
from coda_ray.tiles.store import TileIndex, table_bytes
from coda_ray.training.infer import infer
from coda_ray.training.loop import Report

PROBABILITY = "probability_"


@dataclass(frozen=True)
class EvaluationRun:
    """What an evaluation worker needs; picklable, without weights."""

    title: str
    folder: Folder
    config: Config
    index: TileIndex
    classifier: Stage
    adapted: Stage | None


def evaluate(config: Config, index: TileIndex, what: str, classifier: Stage, adapted: Stage | None = None) -> Stage:
    """Plan the predictions of one model for some tiles.

    Parameters
    ----------
    config
        Settings.
    index
        The tiles.
    what
        Name of the tiles, for people.
    classifier
        The finished labelled stage.
    adapted
        An adaptation whose teacher replaces the feature extractor; the classifier stays as it is.
    """
    tiles = index.without_labels()
    inputs = {"tiles": tiles.fingerprint, "views": config.views.model_dump(mode="json"), "precision": config.train.precision}
    title = f"evaluate {(adapted or classifier).title} on {what}"
    needs = (classifier, adapted) if adapted else (classifier,)
    workload = Workload(
        "inference",
        source=tiles.units("source")[0],
        plates=len(tiles.units("plate")),
        tiles=len(tiles),
        steps=-(-len(tiles) // config.evaluate.minibatch),
        minibatch=config.evaluate.minibatch,
        samples=len(tiles),
    )
    return Stage("evaluate", title, inputs, partial(_make, config, tiles, title, classifier, adapted), needs, workload)


def predictions_of(config: Config, stage: Stage) -> pd.DataFrame:
    """Read the predictions of a finished evaluation: Metadata_ columns, `predicted`, and one probability per class."""
    data = open_place(config.results).read(f"{stage.path}/predictions.parquet")
    frame: pd.DataFrame = pq.read_table(io.BytesIO(data)).to_pandas()
    return frame


def _make(
    config: Config,
    index: TileIndex,
    title: str,
    classifier: Stage,
    adapted: Stage | None,
    folder: Folder,
    report: Report | None,
) -> Made:
    """Describe an evaluation to the worker loop; it has no curve to report."""
    return evaluate_loop, EvaluationRun(title, folder, config, index, classifier, adapted)


def evaluate_loop(config: Mapping[str, Any]) -> dict[str, Any]:
    """Predict one share of the tiles on this worker; rank 0 joins the shares.

    Parameters
    ----------
    config
        `{"run": EvaluationRun}`, as Ray Train passes it.

    Returns
    -------
    dict
        Facts: tiles, unreadable tiles, seconds, classes.
    """
    run: EvaluationRun = config["run"]
    begun = time.monotonic()
    torch.set_num_threads(run.config.train.threads)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    steps = -(-len(run.index) // (run.config.evaluate.minibatch * world))
    start = _parts_done(run, rank, world)
    model = load_model(run.config, run.classifier, run.adapted, len(run.index.channels)).to(device).eval()
    outputs = infer(
        lambda views: _probabilities_and_embedding(model, views),
        run.index,
        crop=run.config.views.tile_crop,
        size=run.config.views.size_global,
        minibatch=run.config.evaluate.minibatch,
        stream=run.config.stream,
        device=device,
        precision=choose_precision(device, run.config.train.precision),
        rank=rank,
        world=world,
        start_step=start,
    )
    for part in outputs:
        columns = {"row": part.rows, "values": list(part.values)}
        run.folder.write(f"parts/{_part(run, rank, world, part.step)}", table_bytes(pa.table(columns)))
        if rank == 0 and steps > 1:
            print(f"{run.title}: mini-batch {part.step + 1}/{steps}", flush=True)
    if world > 1:
        barrier()
    if rank:
        return {}
    return _join(run, begun)


def _part(run: EvaluationRun, rank: int, world: int, step: int) -> str:
    """Name of what one mini-batch leaves; sorts by step among those of one worker of one group size."""
    return f"{run.config.evaluate.minibatch}-{world:03d}-{rank:03d}-{step:06d}.parquet"


def _parts_done(run: EvaluationRun, rank: int, world: int) -> int:
    """Mini-batches that an earlier run of the same shape left finished; they are written in order."""
    prefix = _part(run, rank, world, 0).removesuffix("000000.parquet")
    own = [name for name in _part_names(run) if name.startswith(prefix)]
    return int(own[-1].removeprefix(prefix).removesuffix(".parquet")) + 1 if own else 0


def _part_names(run: EvaluationRun) -> list[str]:
    """Sorted names of finished parts; a worker killed while it wrote leaves others."""
    return sorted(name for name in run.folder.names("parts") if name.endswith(".parquet"))


def load_model(config: Config, classifier: Stage, adapted: Stage | None, channels: int) -> SupervisedModel | DualModel:
    """Load the model of a classifier stage, with an adapted feature extractor where one is given."""
    classes = classifier.inputs["classes"]
    blank, dual = networks.unfilled(config), bool(classifier.needs)
    model = networks.classifier_model(blank, channels=channels, classes=len(classes), dual=dual)
    tensors = stage_tensors(config, classifier)
    model.load_state_dict({name.removeprefix("model."): value for name, value in tensors.items()})
    if adapted is not None:
        if not isinstance(model, DualModel):
            raise TypeError(f"{classifier.title}: only a dual model has a feature extractor that can be adapted")
        model.replace_extractor(teacher_of(stage_tensors(config, adapted)))
    return model


def _probabilities_and_embedding(model: SupervisedModel | DualModel, views: Tensor) -> Tensor:
    """Put the softmax and the CLS token side by side: (B, classes + D)."""
    logits, cls = model(views)
    return torch.cat([logits.float().softmax(1), cls.float()], 1)


def _join(run: EvaluationRun, begun: float) -> dict[str, Any]:
    """Write predictions and embeddings in the order of the tiles, and `done.json` last."""
    parts = [pq.read_table(io.BytesIO(run.folder.read(f"parts/{name}"))) for name in _part_names(run)]
    rows = np.concatenate([part["row"].to_numpy() for part in parts])
    values = np.concatenate([np.stack(part["values"].to_pylist()).astype(np.float32) for part in parts])
    # A run that was broken off may have left parts of another number of workers: the same rows, the same values.
    rows, first = np.unique(rows, return_index=True)
    values = values[first]
    classes = list(run.classifier.inputs["classes"])
    metadata = run.index.frame.iloc[rows].filter(like="Metadata_").reset_index(drop=True)
    probabilities, embedding = values[:, : len(classes)], values[:, len(classes) :]
    predicted = pd.Series([classes[i] for i in probabilities.argmax(1)], name="predicted")
    named = pd.DataFrame(probabilities, columns=[f"{PROBABILITY}{name}" for name in classes])
    features = pd.DataFrame(embedding, columns=[f"feature_{i:04d}" for i in range(embedding.shape[1])])
    for name, table in (("predictions", [metadata, predicted, named]), ("embeddings", [metadata, features])):
        frame = pa.Table.from_pandas(pd.concat(table, axis=1), preserve_index=False)
        run.folder.write(f"{name}.parquet", table_bytes(frame))
    facts = {"tiles": len(rows), "unreadable": len(run.index) - len(rows), "seconds": round(time.monotonic() - begun, 3)}
    if facts["unreadable"]:
        print(
            f"{run.title}: {facts['unreadable']} of {len(run.index)} tiles could not be read and have no prediction", flush=True
        )
    run.folder.write("done.json", json.dumps(facts, indent=1).encode())
    run.folder.delete("parts")
    return facts
