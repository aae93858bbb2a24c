"""The stage that looks: a model over every tile of a source, predictions and embeddings to parquet, no label read."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import ray.train
import torch
from numpy.typing import NDArray
from ray.train.collective import barrier
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from coda_ray.config import Config
from coda_ray.jump.layout import METADATA
from coda_ray.learn.dual import DualModel
from coda_ray.learn.moments import align
from coda_ray.learn.precision import choose_precision
from coda_ray.learn.supervised import SupervisedModel
from coda_ray.learn.ttt import TttRecipe, adapt_each
from coda_ray.learn.vit import load_exactly, tokens
from coda_ray.pipeline import networks
from coda_ray.pipeline.follower import PARTS
from coda_ray.pipeline.moments import moments_of_all, moments_of_tiles
from coda_ray.pipeline.stage import Stage, pass_inputs, pass_workload, settings_of
from coda_ray.pipeline.train_stages import Made, extractor_input, load_model, stage_tensors
from coda_ray.progress import Tell
from coda_ray.storage import Folder, open_place
from coda_ray.tiles.store import TileIndex, read_parquet, table_bytes
from coda_ray.training.infer import infer
from coda_ray.training.launch import device_of
from coda_ray.training.loop import Report

PROBABILITY = "probability_"
FEATURE = "feature_"
TILE_ID = list(METADATA)
Forward = Callable[[Tensor, NDArray[np.int64]], Tensor]


@dataclass(frozen=True)
class EvaluationRun:
    """What an evaluation worker needs; picklable, without weights."""

    title: str
    folder: Folder
    config: Config
    index: TileIndex
    classifier: Stage
    adapted: Stage | None
    autoencoder: Stage | None
    standardised: tuple[Stage, Stage] | None
    seed: int


def evaluate(
    config: Config,
    index: TileIndex,
    what: str,
    classifier: Stage,
    adapted: Stage | None = None,
    *,
    autoencoder: Stage | None = None,
    standardised: tuple[Stage, Stage] | None = None,
    seed: int = 0,
) -> Stage:
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
        An adaptation whose feature extractor replaces the classifier's; the classifier stays as it is.
    autoencoder
        A pre-training of a masked autoencoder, which then learns every image by itself before the classifier sees it
        (test-time training).
    standardised
        Moments of the tokens on the source, before any adaptation, and on the tiles, by the model that is asked: each plate's
        tokens are moved to the source's moments before the classifier sees them (`learn.moments.align`).
    seed
        Seed of the autoencoder's masks.
    """
    tiles = index.without_labels()
    inputs = pass_inputs(config, tiles) | extractor_input(config, adapted or autoencoder)
    title = f"evaluate {(adapted or classifier).title} on {what}"
    if autoencoder:
        settings = settings_of(config.ttt, exclude={"images_at_once", "trains"})
        # Results of before there was a choice are of the whole autoencoder; the key of the encoder alone names it.
        settings |= {} if config.ttt.trains == "all" else {"trains": config.ttt.trains}
        inputs |= {"ttt": settings, "mae": settings_of(config.mae), "seed": seed}
        title = title.replace(classifier.title, f"ttt of {classifier.title}")
    if standardised:
        of = adapted or classifier
        title = title.replace(of.title, f"standardised {of.title}")
    needs = tuple(filter(None, (classifier, adapted, autoencoder, *(standardised or ()))))
    make = partial(_make, config, tiles, title, classifier, adapted, autoencoder, standardised, seed)
    workload = pass_workload(config, tiles, "ttt" if autoencoder else "inference")
    return Stage("evaluate", title, inputs, make, needs, workload)


def predictions_of(config: Config, stage: Stage, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Read the predictions of a finished evaluation: Metadata_ columns, `predicted`, and one probability per class.

    Parameters
    ----------
    config
        Settings.
    stage
        The evaluation.
    columns
        Only these.
    """
    return _table_of(config, stage, "predictions", columns)


def embeddings_of(config: Config, stage: Stage) -> pd.DataFrame:
    """Read the embeddings of a finished evaluation: Metadata_ columns, and `feature_0000`, ... of each tile's CLS token."""
    return _table_of(config, stage, "embeddings")


def write_predictions(
    folder: Folder,
    metadata: pd.DataFrame,
    classes: Sequence[str],
    probabilities: NDArray[np.float32],
    embedding: NDArray[np.float32],
) -> None:
    """Write the two tables of an evaluation, row by row.

    Parameters
    ----------
    folder
        The stage's folder.
    metadata
        (N,) rows of Metadata_ columns.
    classes
        (K,) MoA labels.
    probabilities
        (N, K) float32.
    embedding
        (N, D) float32.
    """
    predicted = pd.Series([classes[i] for i in probabilities.argmax(1)], name="predicted")
    named = pd.DataFrame(probabilities, columns=[f"{PROBABILITY}{name}" for name in classes])
    features = pd.DataFrame(embedding, columns=[f"{FEATURE}{i:04d}" for i in range(embedding.shape[1])])
    metadata = metadata.reset_index(drop=True)
    for name, table in (("predictions", [metadata, predicted, named]), ("embeddings", [metadata, features])):
        frame = pa.Table.from_pandas(pd.concat(table, axis=1), preserve_index=False)
        folder.write(f"{name}.parquet", table_bytes(frame))


def _table_of(config: Config, stage: Stage, name: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Read one table of a finished evaluation, or some of its columns."""
    return cast(pd.DataFrame, read_parquet(open_place(config.results), f"{stage.path}/{name}.parquet", columns).to_pandas())


def _make(
    config: Config,
    index: TileIndex,
    title: str,
    classifier: Stage,
    adapted: Stage | None,
    autoencoder: Stage | None,
    standardised: tuple[Stage, Stage] | None,
    seed: int,
    folder: Folder,
    report: Report | None,
) -> Made:
    """Describe an evaluation to the worker loop; it has no curve to report."""
    return evaluate_loop, EvaluationRun(title, folder, config, index, classifier, adapted, autoencoder, standardised, seed)


def evaluate_loop(config: Mapping[str, Any]) -> dict[str, Any]:
    """Predict one share of the tiles on this worker; rank 0 joins the shares.

    Parameters
    ----------
    config
        `{"run": EvaluationRun, "tell": Tell | None}`, as Ray Train passes it.

    Returns
    -------
    dict
        Facts: tiles, unreadable tiles, seconds, workers.
    """
    run: EvaluationRun = config["run"]
    begun = time.monotonic()
    torch.set_num_threads(run.config.train.threads)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = device_of(run.config.train)
    steps = -(-len(run.index) // (run.config.evaluate.minibatch * world))
    start = _parts_done(run, rank, world)
    tell: Tell | None = config["tell"] if rank == 0 else None
    if tell is not None:
        tell(start, steps)
    model = load_model(run.config, run.classifier, run.adapted, len(run.index.channels)).to(device).eval()
    outputs = infer(
        _forward(run, model, device),
        run.index,
        run.config,
        device=device,
        precision=choose_precision(device, run.config.train.precision),
        rank=rank,
        world=world,
        start_step=start,
    )
    for part in outputs:
        columns = {"row": part.rows, "values": list(part.values)}
        run.folder.child(PARTS).write(_part(run, rank, world, part.step), table_bytes(pa.table(columns)))
        if tell is not None:
            tell(part.step + 1, steps)
        elif rank == 0 and steps > 1:
            print(f"{run.title}: mini-batch {part.step + 1}/{steps}", flush=True)
    if world > 1:
        barrier()
    if rank:
        return {}
    return _join(run, begun, world)


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
    return sorted(name for name in run.folder.names(PARTS) if name.endswith(".parquet"))


def _forward(run: EvaluationRun, model: SupervisedModel | DualModel, device: torch.device) -> Forward:
    """Choose how the model reads images."""
    if run.autoencoder:
        return _test_time_training(run, model, device)
    return _standardised(run, model, device) if run.standardised else partial(_as_it_is, model)


def _as_it_is(model: SupervisedModel | DualModel, views: Tensor, rows: NDArray[np.int64]) -> Tensor:
    """Predict with the model, whatever the rows."""
    return _side_by_side(*model(views))


def _side_by_side(logits: Tensor, cls: Tensor) -> Tensor:
    """Join the softmax of logits (B, classes) and CLS tokens (B, D)."""
    return torch.cat([logits.float().softmax(1), cls.float()], 1)


def _standardised(run: EvaluationRun, model: SupervisedModel | DualModel, device: torch.device) -> Forward:
    """Move each plate's tokens to the source's moments; then the same as `_as_it_is`."""
    of_source, of_plates = cast(tuple[Stage, Stage], run.standardised)
    wanted = moments_of_all(run.config, of_source).to(device)
    own = moments_of_tiles(run.config, of_plates, run.index)

    def read(views: Tensor, rows: NDArray[np.int64]) -> Tensor:
        features = align(model.features(views), own.rows(torch.from_numpy(rows)).to(device), wanted)
        return _side_by_side(model.classify(features), features[:, 0])

    return read


def _test_time_training(run: EvaluationRun, model: SupervisedModel | DualModel, device: torch.device) -> Forward:
    """Let the autoencoder learn each image by itself; then the same as `_as_it_is`, with the adapted encoder."""
    if not isinstance(model, DualModel) or run.autoencoder is None:
        raise TypeError(f"{run.classifier.title}: test-time training needs a dual model on a masked autoencoder")
    learner = networks.masked_autoencoder(networks.unfilled(run.config), channels=len(run.index.channels))
    load_exactly(learner, stage_tensors(run.config, run.autoencoder), run.autoencoder.title)
    learner.to(device)
    ttt = run.config.ttt

    def read(encoder: VisionTransformer, view: Tensor) -> Tensor:
        features = tokens(encoder, view)
        return _side_by_side(model.classify(features), features[:, 0])

    return lambda views, rows: adapt_each(
        learner,
        views,
        rows,
        seed=run.seed,
        recipe=TttRecipe(**ttt.model_dump(exclude={"images_at_once"})),
        images_at_once=ttt.images_at_once,
        readout=read,
    )


def _join(run: EvaluationRun, begun: float, workers: int) -> dict[str, Any]:
    """Write predictions and embeddings in the order of the tiles."""
    parts = [read_parquet(run.folder, f"{PARTS}/{name}") for name in _part_names(run)]
    rows = np.concatenate([part["row"].to_numpy() for part in parts])
    values = np.concatenate([np.stack(part["values"].to_pylist()).astype(np.float32) for part in parts])
    # A run that was broken off may have left parts of another number of workers: the same rows, the same values.
    rows, first = np.unique(rows, return_index=True)
    values = values[first]
    classes = list(run.classifier.inputs["classes"])
    metadata = run.index.frame.iloc[rows].filter(like="Metadata_")
    probabilities, embedding = values[:, : len(classes)], values[:, len(classes) :]
    write_predictions(run.folder, metadata, classes, probabilities, embedding)
    facts = {
        "tiles": len(rows),
        "unreadable": len(run.index) - len(rows),
        "seconds": round(time.monotonic() - begun, 3),
        "workers": workers,
    }
    if facts["unreadable"]:
        print(
            f"{run.title}: {facts['unreadable']} of {len(run.index)} tiles could not be read and have no prediction", flush=True
        )
    return facts
