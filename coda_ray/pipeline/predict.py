"""Predictions for whole plates: a model and tiles in, tables per plate out, no label read.

One Ray Data pipeline over all plates, so that the model is loaded once per process and not once per plate:

    sample numbers ──► read tasks (tiles) ──► processes that hold the model ──► driver: a plate is written when its last
                                                                                tile is in, `plate.json` last

Ray Data's back-pressure bounds what is in flight, and the driver holds the plates that are not whole yet. A stage of Ray Train
would need a group of workers per plate, or results of all plates in one piece; here a plate is the unit that is resumed.
"""

import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import ray
import torch
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy, TaskPoolStrategy
from ray.exceptions import RayError

from coda_ray.config import Config, ConfigError, Train
from coda_ray.jump.ingest import run_ingest
from coda_ray.jump.prepare import preparation_of
from coda_ray.learn.exported import ExportedModel
from coda_ray.learn.precision import choose_precision
from coda_ray.pipeline.evaluate import FEATURE, PROBABILITY, TILE_ID
from coda_ray.pipeline.models import Origin
from coda_ray.pipeline.profile import WELL_ID, well_profiles
from coda_ray.pipeline.task import cause_of, room
from coda_ray.storage import Folder, open_place
from coda_ray.tiles.store import COMPOUND, TileIndex, TileStore, table_bytes
from coda_ray.tiles.stream import MEND_TILES, Health, UnreadableTilesError, sample_dataset
from coda_ray.tracking.figures import figure_png
from coda_ray.tracking.plate_figures import plate_figure
from coda_ray.tracking.records import READS_AT_A_TIME
from coda_ray.training.infer import in_order

MODEL = "Metadata_Model"
# How many classes a table names beside all probabilities.
TOP = 3
PLATE_ID = TILE_ID[:3]
DEFAULT_FOLDER = "predictions"
# Plates that are whole and not written yet.
WRITES_AT_A_TIME = 4
Columns = dict[str, NDArray[Any]]


class PredictionError(RuntimeError):
    """Predictions that stopped; the text says why and what to do."""


@dataclass(frozen=True)
class Predictions:
    """What a run did.

    Parameters
    ----------
    folder
        Address of the tables: `<out>/<key of the model>`.
    plates, before
        Plates predicted now, and those that were whole before.
    tiles, unreadable
        Tiles of the plates predicted now, and those among them that could not be read.
    workers
        Processes that held the model, at most.
    seconds
        Duration.
    """

    folder: str
    plates: int
    before: int
    tiles: int
    unreadable: int
    workers: int
    seconds: float

    @property
    def text(self) -> str:
        """Lines for people."""
        known = f"; {self.before} plates were there before" if self.before else ""
        if not self.plates:
            return f"nothing to do{known}: {self.folder}"
        rate = self.tiles / max(self.seconds, 1e-9)
        took = f"{self.seconds:.1f} s: {rate:.1f} tiles/s, {self.workers} worker(s)"
        lines = [f"{self.plates} plates, {self.tiles} tiles in {took}{known}", f"tables and pictures: {self.folder}"]
        if self.unreadable:
            lines.append(f"{self.unreadable} tiles could not be read; they are in unreadable.parquet of their plates")
        return "\n".join(lines)


@dataclass(frozen=True)
class Told:
    """What the tables say of a model and how it was run, without its weights."""

    key: str
    classes: list[str]
    origin: dict[str, Any]
    precision: str

    @property
    def text(self) -> str:
        """For people."""
        return f"{Origin(**self.origin).text} (model {self.key})"


@dataclass
class _Plate:
    """One plate on its way.

    Parameters
    ----------
    index
        Its tiles.
    first
        Number of its first tile among those of the run.
    """

    index: TileIndex
    first: int
    missing: int
    arrived: list[Columns] = field(default_factory=list)

    @cached_property
    def path(self) -> str:
        """Folder of its tables."""
        return "/".join(self.index.frame[PLATE_ID].iloc[0])


def predict(config: Config, model: ExportedModel, tiles: TileIndex, progress: Callable[[int, int], None]) -> Predictions:
    """Predict every plate that has no tables of this model yet. Ray must be running.

    Parameters
    ----------
    config
        Settings; section `predict` says where to.
    model
        The model.
    tiles
        The plates, from `tiles_of`.
    progress
        Called with the tiles that are done and their number.

    Returns
    -------
    Predictions

    Raises
    ------
    UnreadableTilesError
        When more than `stream.max_bad_share` of the tiles cannot be read; at the end, when none of some plate can.
    PredictionError
        When a worker fails, or the note of a plate is damaged.
    """
    begun = time.monotonic()
    out = predictions_folder(config, model.key)
    wanted = plates_of(tiles)
    with ThreadPoolExecutor(READS_AT_A_TIME) as pool:
        done = pool.map(lambda index: _is_done(out, index, model, config.train.precision), wanted)
        todo = [index for index, known in zip(wanted, done, strict=True) if not known]
    tiles_to_do = sum(map(len, todo))
    most = config.predict.workers or room(config.train.model_copy(update={"workers": "1"}))
    workers = max(1, min(most, -(-tiles_to_do // config.evaluate.minibatch)))
    unreadable = _run(config, model, todo, workers, out, progress) if todo else 0
    seconds = time.monotonic() - begun
    return Predictions(out.address(), len(todo), len(wanted) - len(todo), tiles_to_do, unreadable, workers, seconds)


def predictions_folder(config: Config, key: str) -> Folder:
    """Open the folder of the predictions of a model, by its key; below it `<source>/<batch>/<plate>`."""
    results = config.results.model_copy(update={"address": config.predict.out}) if config.predict.out else config.results
    place = open_place(results)
    return (place if config.predict.out else place.child(DEFAULT_FOLDER)).child(key)


def ingest_missing(config: Config, model: ExportedModel, progress: Callable[[int, int], None]) -> str:
    """Prepare the tiles of the wanted plates from raw images, and sum up.

    Raises
    ------
    ModelError
        When the settings would not prepare them as the model's were.
    IngestError, ValueError
        As `run_ingest`.
    """
    model.require(config.ingest.channels, preparation_of(config), "section ingest")
    chosen = {name: named for name in ("sources", "plates") if (named := getattr(config.predict, name))}
    wanted = config.model_copy(update={"ingest": config.ingest.model_copy(update=chosen)})
    return run_ingest(wanted, lambda now: progress(now.sites_done, now.sites_total)).text()


def tiles_of(config: Config, model: ExportedModel) -> TileIndex:
    """Load the index of the wanted plates, without labels.

    Raises
    ------
    ModelError
        When they are not prepared as the model's were.
    ConfigError
        When a plate is not there, or its tiles are smaller than the model's crop.
    FileNotFoundError
        When a source has no finished plate.
    """
    tiles, preparation = open_place(config.tiles), preparation_of(config)
    model.require(config.ingest.channels, preparation, tiles.address())
    store, named = TileStore.open(tiles, preparation), config.predict.plates
    sources = config.predict.sources or sorted({path.partition("/")[0] for path in store.plates()})
    if not sources:
        raise FileNotFoundError(
            f"{store.folder.address()}: no finished plate prepared as the model wants; run jobs/ingest.py, or give "
            "--predict.ingest true"
        )
    index = store.index(sources).without_labels()
    missing = sorted(set(named) - set(index.frame["Metadata_Plate"]))
    if missing:
        raise ConfigError(
            f"predict.plates = {missing[0]!r}: {', '.join(sources)} has no such finished plate; ingest it, or correct it"
        )
    index = index.where(index.frame["Metadata_Plate"].isin(named)) if named else index
    side, crop = index.smallest_side, model.tile_crop
    if side < crop:
        raise ConfigError(f"{store.folder.address()}: tiles of {side} px are smaller than the model's crop of {crop} px")
    return index


def plates_of(index: TileIndex) -> list[TileIndex]:
    """Split an index into its plates."""
    groups = index.frame.groupby(PLATE_ID, sort=True)
    return [TileIndex(rows.reset_index(drop=True), index.folder, index.channels) for _, rows in groups]


def image_table(index: TileIndex, classes: Sequence[str], key: str, rows: NDArray[np.int64], columns: Columns) -> pd.DataFrame:
    """Lay out the predictions of images.

    Parameters
    ----------
    index
        The tiles.
    classes
        K MoA labels.
    key
        Key of the model.
    rows
        (N,) rows of the index.
    columns
        `probabilities` (N, K), `embedding` (N, D).

    Returns
    -------
    DataFrame
        Metadata_ columns with that of the model, the likeliest classes, `confidence`, `probability_<class>`, `feature_0000`, ...
    """
    metadata = index.frame.iloc[rows].filter(like="Metadata_").assign(**{MODEL: key}).reset_index(drop=True)
    named = pd.DataFrame(columns["probabilities"], columns=[f"{PROBABILITY}{name}" for name in classes])
    features = columns["embedding"]
    embedded = pd.DataFrame(features, columns=[f"{FEATURE}{number:04d}" for number in range(features.shape[1])])
    return pd.concat([metadata, _likeliest(named), named, embedded], axis=1)


def well_table(images: pd.DataFrame) -> pd.DataFrame:
    """Average the images of each well: the mean of their softmax, as wells are scored, and of their features.

    Parameters
    ----------
    images
        From `image_table`, of one plate.

    Returns
    -------
    DataFrame
        One row per well: as `image_table`, without the site, with `Metadata_Image_Count`, `image_agreement` (share of the images
        whose own likeliest class is the well's) and `replicate_agreement` (share of the compound's other wells of the plate
        whose class is the same; NaN where there is none).
    """
    measures = [*images.filter(like=PROBABILITY), *images.filter(like=FEATURE)]
    known = images[[*images.filter(like="Metadata_"), *measures]]
    wells = well_profiles(known, measures)
    top = _likeliest(wells.filter(like=PROBABILITY))
    said = images[WELL_ID].merge(pd.concat([wells[WELL_ID], top["predicted"]], axis=1), on=WELL_ID)["predicted"]
    agrees = (said.to_numpy(str) == images["predicted"].to_numpy(str)).astype(float)
    shares = images[WELL_ID].assign(agrees=agrees).groupby(WELL_ID, sort=True)["agrees"].mean().to_numpy()
    alike = _replicates_alike(wells[COMPOUND], top["predicted"])
    head = wells.drop(columns=measures)
    return pd.concat([head, top.assign(image_agreement=shares, replicate_agreement=alike), wells[measures]], axis=1)


def _likeliest(probabilities: pd.DataFrame) -> pd.DataFrame:
    """Name the likeliest classes of each row, and the probability of the first."""
    classes = np.array([str(name).removeprefix(PROBABILITY) for name in probabilities], object)
    values = probabilities.to_numpy()
    order = np.argsort(-values, axis=1, kind="stable")[:, :TOP]
    names = ["predicted", *(f"predicted_{place}" for place in range(2, order.shape[1] + 1))]
    top = pd.DataFrame({name: classes[order[:, place]] for place, name in enumerate(names)})
    top.insert(1, "confidence", values.max(axis=1) if len(values) else np.empty(0, np.float32))
    return top


def _replicates_alike(compounds: "pd.Series[str]", predicted: "pd.Series[str]") -> NDArray[np.float64]:
    """Share of each well's replicates with the same class; NaN without a compound or replicate."""
    frame = pd.DataFrame({"compound": compounds, "predicted": predicted})
    wells = frame.groupby("compound")["predicted"].transform("size")
    same = frame.groupby(["compound", "predicted"])["predicted"].transform("size")
    return np.where(wells > 1, (same - 1) / (wells - 1).clip(lower=1), np.nan)


class _Predictor:
    """Holds the model in a process: an actor of the pool on a GPU, in a warm process elsewhere."""

    def __init__(self, model: "list[ray.ObjectRef[ExportedModel]]", train: Train) -> None:
        torch.set_num_threads(train.threads)
        self.device = torch.device("cuda" if train.gpus_per_worker else "cpu")
        self.model = ray.get(model[0])
        self.model.network.to(self.device).eval()
        self.precision = choose_precision(self.device, train.precision)

    def __call__(self, batch: Columns) -> Columns:
        """Predict a mini-batch; rows that could not be read are NaN."""
        # A tile that could not be read is black.
        found = self.model.predict(torch.from_numpy(batch["tile"].copy()).to(self.device), self.precision)
        kept = {name: batch[name] for name in ("sample", "row", "readable", "replaced", "reason")}
        for name in ("probabilities", "embedding"):
            kept[name] = getattr(found, name).cpu().numpy()
            kept[name][~batch["readable"]] = np.nan
        return kept


# The model that this process holds, by its key and how it is run.
_held: dict[str, _Predictor] = {}


def _predict_warm(batch: Columns, *, key: str, model: "list[ray.ObjectRef[ExportedModel]]", train: Train) -> Columns:
    """Predict a mini-batch in a process that Ray keeps: the first one of a model loads it, the next ones find it."""
    name = f"{key} {train.model_dump_json()}"
    if name not in _held:
        _held.clear()
        _held[name] = _Predictor(model, train)
    return _held[name](batch)


def _is_done(out: Folder, index: TileIndex, model: ExportedModel, precision: str) -> bool:
    """Whether a plate has whole tables of this model for these tiles, in this `train.precision`.

    Raises
    ------
    PredictionError
        When its note is damaged.
    """
    path = f"{'/'.join(index.frame[PLATE_ID].iloc[0])}/plate.json"
    try:
        note = json.loads(out.read(path))
        return [note[name] for name in ("model", "tiles", "precision")] == [model.key, index.fingerprint, precision]
    except FileNotFoundError:
        return False
    except (ValueError, TypeError, KeyError) as error:
        told = f"{out.address(path)}: is damaged ({type(error).__name__}: {error})"
        raise PredictionError(f"{told}; delete it, and the plate is predicted again") from error


def _run(
    config: Config,
    model: ExportedModel,
    todo: Sequence[TileIndex],
    workers: int,
    out: Folder,
    progress: Callable[[int, int], None],
) -> int:
    """Predict plates; give the number of tiles that could not be read."""
    firsts = np.cumsum([0, *map(len, todo)])
    plates = [_Plate(index, int(first), len(index)) for index, first in zip(todo, firsts, strict=False)]
    whole = TileIndex(pd.concat([index.frame for index in todo], ignore_index=True), todo[0].folder, todo[0].channels)
    health, done, writing = Health(config.stream.max_bad_share, False), 0, deque[ray.ObjectRef[None]]()
    told = Told(model.key, model.classes, dict(model.description["origin"]), config.train.precision)
    lost: dict[str, str] = {}
    try:
        for columns in _stream(config, model, whole, workers):
            health.count(columns)
            numbers = np.searchsorted(firsts, columns["row"], side="right") - 1
            for number in np.unique(numbers):
                plate = plates[number]
                columns_of_plate = _take(plate, {name: values[numbers == number] for name, values in columns.items()})
                if columns_of_plate and not columns_of_plate["readable"].any():
                    lost[plate.path] = str(columns_of_plate["reason"][0])
                elif columns_of_plate:
                    writing.append(_write.remote(plate.index, plate.first, columns_of_plate, told, out.child(plate.path)))
            if len(writing) > WRITES_AT_A_TIME:
                ray.get(writing.popleft())
            done += len(numbers)
            progress(done, len(whole))
        ray.get(list(writing))
    except RayError as error:
        cause = cause_of(error)
        raise PredictionError(f"{type(cause).__name__}: {cause}; mend it and start again: finished plates are kept") from error
    if lost:
        why = "; ".join(f"{path}: {reason}" for path, reason in lost.items())
        raise UnreadableTilesError(
            f"no tile of {len(lost)} plate(s) could be read, so they have no tables; the others are finished; {MEND_TILES}, "
            f"and start again: {why}"
        )
    return health.bad


def _stream(config: Config, model: ExportedModel, index: TileIndex, workers: int) -> Iterator[Columns]:
    """Read the tiles in order and predict them; what an execution plans is bounded."""
    train, minibatch = config.train, config.evaluate.minibatch
    source, held = ray.put(in_order(index, model.tile_crop)), ray.put(model)
    settings = config.stream.model_copy(update={"tasks": config.stream.tasks * workers})
    step = config.stream.segment_steps * minibatch
    for begin in range(0, len(index), step):
        dataset = sample_dataset(source, np.arange(begin, min(begin + step, len(index)), dtype=np.int64), settings)
        rows = partial(dataset.map_batches, batch_size=minibatch, batch_format="numpy", num_cpus=train.cpus_per_worker)
        if train.gpus_per_worker:
            # A task that used a GPU takes its process, and the model in it, along when it ends.
            pool = ActorPoolStrategy(min_size=1, max_size=workers, initial_size=workers)
            constructor = {"model": [held], "train": train}
            predicted = rows(
                cast(Any, _Predictor), fn_constructor_kwargs=constructor, compute=pool, num_gpus=train.gpus_per_worker
            )
        else:
            told = {"key": model.key, "model": [held], "train": train}
            predicted = rows(cast(Any, _predict_warm), fn_kwargs=told, compute=TaskPoolStrategy(size=workers))
        yield from cast(Iterator[Columns], predicted.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0))


def _take(plate: _Plate, columns: Columns) -> Columns | None:
    """Take what came back of a plate; give all of it when it is whole."""
    plate.arrived.append(columns)
    plate.missing -= len(columns["row"])
    if plate.missing:
        return None
    joined = {name: np.concatenate([part[name] for part in plate.arrived]) for name in columns}
    plate.arrived.clear()
    return joined


# Drawing takes a second or more, so it is not done where the stream is; it reserves nothing that the pool may hold.
@ray.remote(num_cpus=0)
def _write(index: TileIndex, first: int, columns: Columns, told: Told, folder: Folder) -> None:
    """Write the tables and the picture of a plate, and `plate.json` last, which makes them count."""
    order = np.argsort(columns["row"], kind="stable")
    columns = {name: values[order] for name, values in columns.items()}
    rows, readable = columns["row"] - first, columns["readable"]
    seen = {name: columns[name][readable] for name in ("probabilities", "embedding")}
    images = image_table(index, told.classes, told.key, rows[readable], seen)
    wells = well_table(images)
    lost = index.frame.iloc[rows[~readable]].filter(regex="^Metadata_|^shard$|^row$").assign(reason=columns["reason"][~readable])
    for name, table in (("images", images), ("wells", wells), ("unreadable", lost)):
        folder.write(f"{name}.parquet", table_bytes(pa.Table.from_pandas(table, preserve_index=False)))
    folder.write("plate.png", figure_png(plate_figure(wells, f"{'/'.join(index.frame[PLATE_ID].iloc[0])}: {told.text}")))
    counts = {"images": len(images), "wells": len(wells), "unreadable": len(lost)}
    note = {"model": told.key, "origin": told.origin, "tiles": index.fingerprint, "precision": told.precision, **counts}
    folder.write("plate.json", json.dumps(note, indent=1).encode())
