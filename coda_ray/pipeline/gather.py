"""The report of a matrix: gathering what its finished stages found, and writing the page; nothing is trained."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product
from typing import Any, cast

import numpy as np
import pandas as pd
import torch

from coda_ray.analysis.intervals import paired_difference
from coda_ray.cluster import start_ray
from coda_ray.config import Config, ConfigError, labs_of
from coda_ray.learn.views import evaluation_view
from coda_ray.methods import ADAPTING, NAMES, Method, row_of
from coda_ray.pipeline import data
from coda_ray.pipeline.evaluate import TILE_ID, predictions_of
from coda_ray.pipeline.layers import compare_layers, layers_of
from coda_ray.pipeline.maps import map_features, map_of
from coda_ray.pipeline.matrix import job_key, plan_all, requests_of, run_stages
from coda_ray.pipeline.profile import WELL_ID
from coda_ray.pipeline.request import Request
from coda_ray.pipeline.stage import Stage
from coda_ray.pipeline.train_stages import pretrain, root_of
from coda_ray.pipeline.transfer import BOOTSTRAP_SEED, Transfer, plan, stages_of, unadapted
from coda_ray.progress import Say
from coda_ray.storage import Folder, open_place
from coda_ray.tiles.store import COMPOUND, LABEL, UNIT_COLUMNS, TileIndex, content_key, read_tiles
from coda_ray.tracking.findings import (
    DATA_COLUMNS,
    DIFFERENCE_COLUMNS,
    POOLED,
    Example,
    FeatureMap,
    Findings,
    LayerComparison,
)
from coda_ray.tracking.page import PAGE, PAGE_VERSION, report_files
from coda_ray.tracking.records import read_record, read_records, transfers_frame
from coda_ray.tracking.runs import Tracker
from coda_ray.tracking.store import REPORT
from coda_ray.tracking.table import job_matrix, rows_that_count

REMEDY = "python jobs/matrix.py --config ..."
SHOWN_CHANNELS = 3


@dataclass(frozen=True)
class Shown:
    """What is drawn of one pair of sources: stages of the matrix, and those that this report adds.

    Parameters
    ----------
    pair
        Source and target.
    methods
        The unadapted model and the adaptation.
    map
        The map; None while the evaluations are unfinished.
    layers
        The comparisons of layers whose feature extractors are there: `adaptation` (before with after), `own` (after with the
        target's own).
    """

    pair: tuple[str, str]
    methods: tuple[Method, Method]
    map: Stage | None
    layers: Mapping[str, Stage]

    @property
    def stages(self) -> list[Stage]:
        """What this report adds."""
        return [*([self.map] if self.map else []), *self.layers.values()]


@dataclass(frozen=True)
class Written:
    """A report in storage.

    Parameters
    ----------
    address
        Of the page.
    files
        Number of files, the page among them.
    fresh
        Whether it was written now; False where the same report was there.
    unfinished
        How many stages of the matrix, and stages of the report itself, could not be shown.
    failed
        How many of the report's own stages ran now and failed.
    """

    address: str
    files: int
    fresh: bool
    unfinished: int
    failed: int


def write_report(config: Config, out: Folder | None, say: Say) -> Written:
    """Write the report of the configuration's matrix, unless it is there already.

    Parameters
    ----------
    config
        Settings; `matrix` names what is shown, `report` how.
    out
        Folder for the files; None takes `report/<job key>` of the results.
    say
        Receives lines of progress.

    Returns
    -------
    Written
        Where it is.

    Raises
    ------
    ConfigError
        When `report` asks for what the matrix does not have; DataError, when tiles are not there.
    """
    results = open_place(config.results)
    requests = requests_of(config)
    transfers = plan_all(config, requests)
    stages = stages_of(transfers)
    job = _job(config, results, job_key("matrix", requests, stages))
    folder = out or results.child(f"{REPORT}/{job['key']}")
    unfinished = [stage for stage in stages if stage.facts(results) is None]
    notes, shown = _shown(config, results)
    failures = _draw(config, results, shown, say)
    notes += failures
    scored = {transfer.key for transfer in transfers if len(transfer.index)}
    records = [record for record in read_records(results, "transfers") if record["key"] in scored]
    key = content_key(
        {
            "page": PAGE_VERSION,
            "job": job,
            "transfers": sorted(record["key"] for record in records),
            "unfinished": [stage.key for stage in unfinished],
            "shown": [stage.key for one in shown for stage in one.stages],
            "notes": notes,
            "report": config.report.model_dump(mode="json"),
        }
    )
    told = folder.read_json("report.json") or {}
    if told.get("key") == key:
        return Written(folder.address(PAGE), len(told["files"]), False, len(unfinished) + len(notes), len(failures))
    say(f"gathering {len(records)} transfers")
    frame = transfers_frame(records)
    found = Findings(
        job=job,
        data=pd.DataFrame(_sources(config), columns=list(DATA_COLUMNS)),
        transfers=frame,
        matrix=job_matrix(frame, {"transfers": frame["key"].tolist()}) if records else pd.DataFrame(),
        differences=pd.DataFrame(_differences(config, transfers, frame), columns=list(DIFFERENCE_COLUMNS)),
        examples=_examples(config),
        maps=[_map(config, one) for one in shown if one.map and one.map.facts(results)],
        layers=[_layers(config, one, name) for one in shown for name, stage in one.layers.items() if stage.facts(results)],
        unfinished=[stage.title for stage in unfinished],
        unscored=_unscored(results, transfers, {record["key"] for record in records}),
        remedy=job["command"],
        notes=notes,
    )
    written = report_files(found)
    for name, content in written.items():
        folder.write(name, content)
    for name in set(told.get("files", [])) - set(written):
        folder.delete(name)
    folder.write("report.json", json.dumps({"key": key, "files": sorted(written)}, indent=1).encode())
    _send(config, results, job, written)
    return Written(folder.address(PAGE), len(written), True, len(unfinished) + len(notes), len(failures))


def _job(config: Config, results: Folder, key: str) -> dict[str, Any]:
    """Read the record of the matrix; one that was never started, or in parts, has none."""
    try:
        return read_record(results, f"jobs/{key}.json")
    except FileNotFoundError:
        return {"key": key, "kind": "matrix", "name": "matrix that was not run as one job", "command": REMEDY}


def _unscored(results: Folder, transfers: Sequence[Transfer], scored: set[str]) -> int:
    """Count the transfers whose stages are finished and that have no score yet."""
    waiting = [transfer for transfer in transfers if len(transfer.index) and transfer.key not in scored]
    return sum(transfer.last.facts(results) is not None for transfer in waiting)


def _send(config: Config, results: Folder, job: dict[str, Any], files: Mapping[str, bytes]) -> None:
    """Put the report on the matrix's run in MLflow; a matrix that was never started has none."""
    if "config" not in job:
        return
    tracker = Tracker.open(config.tracking, results)
    tracker.report(job, files)
    tracker.close()


def _sources(config: Config) -> Iterator[list[Any]]:
    """Count what each source of the matrix holds."""
    for source in _names(config):
        index = data.load_tiles(config, source)
        frame = index.frame
        yield [
            source,
            *[frame[UNIT_COLUMNS[granularity]].nunique() for granularity in ("batch", "plate")],
            len(frame[WELL_ID].drop_duplicates()),
            *[frame[column].nunique() for column in (COMPOUND, LABEL)],
            len(frame),
            int(frame[LABEL].notna().sum()),
            " × ".join(map(str, frame[["height", "width"]].max())),
            float(frame["pixel_size_um"].median()),
        ]


def _names(config: Config) -> list[str]:
    """List the labs of the matrix, sources and targets."""
    return list(dict.fromkeys(lab for name in (*config.matrix.sources, *config.matrix.targets) for lab in labs_of(name)))


def _examples(config: Config) -> list[Example]:
    """Read example tiles of each source, of the same compounds where all have some in common."""
    indices = {name: data.load_tiles(config, name) for name in _names(config)}
    held = [set(index.frame[COMPOUND].dropna()) for index in indices.values()]
    common = sorted(set.intersection(*held))
    wanted = [common[i] for i in np.linspace(0, len(common) - 1, min(config.report.example_tiles, len(common))).astype(int)]
    found = (_example(config, name, index, wanted) for name, index in indices.items())
    return [example for example in found if example is not None]


def _example(config: Config, name: str, index: TileIndex, wanted: Sequence[str]) -> Example | None:
    """Read one source's first tile of each compound, or its first tiles; what cannot be read is left out."""
    first = index.frame.drop_duplicates(COMPOUND)
    rows = [int(first.index[first[COMPOUND] == compound][0]) for compound in wanted]
    rows = rows or list(range(min(config.report.example_tiles, len(index))))
    read = read_tiles(index, np.array(rows, np.int64), config.views.tile_crop)
    tiles = [(row, tile) for row, tile in zip(rows, read, strict=True) if not isinstance(tile, Exception)]
    if not tiles:
        return None
    raw = np.stack([tile[:SHOWN_CHANNELS] for _, tile in tiles])
    compounds = index.frame[COMPOUND].iloc[[row for row, _ in tiles]].fillna("no compound")
    return Example(
        source=name,
        compounds=tuple(compounds),
        channels=index.channels[:SHOWN_CHANNELS],
        raw=raw,
        normalised=evaluation_view(torch.from_numpy(raw), config.views.tile_crop).numpy(),
        pixel_size_um=float(index.frame["pixel_size_um"].iloc[rows[0]]),
    )


def _shown(config: Config, results: Folder) -> tuple[list[str], list[Shown]]:
    """Plan maps and comparisons of layers; the first of the two says what cannot be planned, and why."""
    matrix, wanted = config.matrix, config.report
    adapting = [method for method in matrix.methods if method in ADAPTING]
    pairs = [(s, t) for s, t in product(matrix.sources, matrix.targets) if t not in labs_of(s)]
    if wanted.method and wanted.method not in adapting:
        raise ConfigError(
            f"report.method = {wanted.method!r}: not in matrix.methods; choose from {', '.join(adapting) or 'none'}"
        )
    for pair in wanted.pairs:
        if pair not in pairs:
            raise ConfigError(
                f"report.pairs = {list(pair)}: not in the matrix; give a source and a target of it that differ, of a pool none "
                "of its labs"
            )
    if not adapting or not pairs:
        return ["Maps and layers (figures 5 and 6): no method of the matrix adapts a feature extractor to another source."], []
    method = wanted.method or adapting[-1]
    config = config.model_copy(update={"split": matrix.splits[0]})
    notes, shown = [], []
    for source, target in wanted.pairs or pairs[:1]:
        request = Request(source, target, method, "source", matrix.seeds[0], config.split)
        one, why = _planned(config, results, request)
        shown.append(one)
        notes += why
    return notes, shown


def _planned(config: Config, results: Folder, request: Request) -> tuple[Shown, list[str]]:
    """Plan what is drawn of one pair."""
    before, after = plan(config, request)
    adapted = cast(Stage, after.trained)
    extractor = root_of(adapted)
    index = data.load_tiles(config, request.target)
    pair, notes = f"{request.source} → {request.target}", []

    def lacks(figure: str, *stages: Stage) -> bool:
        missing = [stage.title for stage in stages if stage.facts(results) is None]
        if missing:
            notes.append(f"{figure} of {pair}: not finished: {'; '.join(missing)}.")
        return bool(missing)

    found_map = None
    if not lacks("Map (figure 5)", before.evaluation, after.evaluation):
        found_map = map_features(config, index, before.evaluation, after.evaluation)
    layers = {}
    if not lacks("Layers (figure 6)", extractor, adapted):
        layers["adaptation"] = compare_layers(config, index, extractor, adapted)
        own = _own(config, results, request, extractor)
        if own:
            layers["own"] = compare_layers(config, index, adapted, own)
        else:
            notes.append(
                f"Layers beside the target's own model (figure 6) of {pair}: these results have no model that was pre-trained on "
                f"{request.target}; add it to matrix.sources and run the matrix."
            )
    return Shown((request.source, request.target), (unadapted(config, request.method), request.method), found_map, layers), notes


def _own(config: Config, results: Folder, request: Request, extractor: Stage) -> Stage | None:
    """Find the target's own pre-training, where it is finished."""
    try:
        own = pretrain(config, request.target, objective=extractor.inputs["objective"], seed=request.seed)
    except data.DataError:  # its tiles cannot be trained on
        return None
    return own if own.facts(results) else None


def _draw(config: Config, results: Folder, shown: Sequence[Shown], say: Say) -> list[str]:
    """Run what is missing of the stages that this report adds; say which failed."""
    missing = [stage for one in shown for stage in one.stages if stage.facts(results) is None]
    if not missing:
        return []
    start_ray()
    return [f"{title}: {reason}" for title, reason in run_stages(config, missing, say).items()]


def _map(config: Config, shown: Shown) -> FeatureMap:
    """Read a map, and give its tiles their labels."""
    source, target = shown.pair
    frame = map_of(config, cast(Stage, shown.map))
    moa = data.load_tiles(config, target).frame.set_index(TILE_ID)[LABEL]
    labels = moa.reindex(pd.MultiIndex.from_frame(frame[TILE_ID])).to_numpy(object)
    named = frame.rename(columns={UNIT_COLUMNS["batch"]: "batch"})[["state", "x", "y", "batch"]].assign(moa=labels)
    return FeatureMap(source, target, *shown.methods, config.matrix.seeds[0], named)


def _layers(config: Config, shown: Shown, name: str) -> LayerComparison:
    """Read a comparison of layers."""
    (source, target), (before, after) = shown.pair, shown.methods
    first, second, title = {
        "adaptation": (f"{before} of {source}", f"{after} to {target}", "layers before and after adaptation"),
        "own": (f"{after} to {target}", f"{before} of {target}", "layers of the adapted and of the target's own model"),
    }[name]
    cka = layers_of(config, shown.layers[name])
    return LayerComparison(
        f"{name}-{source}-{target}", f"{title}, {source} → {target}", first, second, config.matrix.seeds[0], cka
    )


def _differences(config: Config, transfers: Sequence[Transfer], frame: pd.DataFrame) -> Iterator[list[Any]]:
    """Compare methods in pairs on the same images, per target and over all, at every split and granularity."""
    of_key = {transfer.key: transfer for transfer in transfers}
    across = frame[frame["source"] != frame["target"]]
    for split, granularity in product(config.matrix.splits, config.matrix.granularities):
        rows = rows_that_count(across[across["split"] == split], granularity)
        per_pair = {
            cast(tuple[str, str], pair): answers(config, [of_key[key] for key in part["key"]])
            for pair, part in rows.groupby(["target", "source"])
        }
        for method, against in _comparisons(config):
            per_target: dict[str, list[pd.DataFrame]] = defaultdict(list)
            for (target, _), right in per_pair.items():
                if {method, against} <= set(right.columns.get_level_values(0)):
                    per_target[target].append(right[[method, against]])
            everything = {**per_target, POOLED: list(chain(*per_target.values()))} if len(per_target) > 1 else per_target
            for target, parts in everything.items():
                seeds = sorted(set.intersection(*[set(part[name].columns) for part in parts for name in (method, against)]))
                if seeds:
                    yield [split, granularity, target, method, against, *compared(parts, method, against, seeds)]


def _comparisons(config: Config) -> list[tuple[Method, Method]]:
    """Pair each method with the model that it starts from, and some with each other."""
    chosen = [method for method in NAMES if method in config.matrix.methods]
    pairs = [(method, unadapted(config, method)) for method in chosen if unadapted(config, method) != method]
    return pairs + [(method, rival) for method in chosen for rival in row_of(method).rivals if rival in chosen]


def compared(
    parts: Sequence[pd.DataFrame], method: Method, against: Method, seeds: list[int]
) -> tuple[float, float, float, int, int, int]:
    """Compare two methods on the same images; a well is drawn for all sources at once.

    Parameters
    ----------
    parts
        From `answers`, with columns of both methods.
    method, against
        The difference is the accuracy of the first minus that of the second.
    seeds
        Those that count; every part has them.

    Returns
    -------
    tuple
        Difference, lower and upper bound of its 95 % interval, numbers of images, wells and seeds.
    """
    joined = pd.concat(parts)
    wells = joined.index.to_frame(index=False)[TILE_ID[:4]].agg("/".join, axis=1).to_numpy(str)
    sides = (joined[name][seeds].to_numpy(bool).T for name in (method, against))
    found = paired_difference(wells, *sides, seed=BOOTSTRAP_SEED)
    return *found, len(joined.index.unique()), len(np.unique(wells)), len(seeds)


def answers(config: Config, transfers: Sequence[Transfer]) -> pd.DataFrame:
    """Say of each image of one target whether each model from one source was right.

    Returns
    -------
    DataFrame
        bool; one row per tile that every model has a prediction for, one column per (method, seed).
    """
    columns: dict[tuple[str, int], list[pd.Series]] = defaultdict(list)
    for transfer in transfers:
        told = predictions_of(config, transfer.evaluation, [*TILE_ID, "predicted"]).set_index(TILE_ID)["predicted"]
        truth = transfer.index.frame.set_index(TILE_ID)[LABEL]
        both = pd.concat([told, truth], axis=1, join="inner")
        columns[transfer.identity["method"], transfer.identity["seed"]].append(both["predicted"] == both[LABEL])
    right: pd.DataFrame = pd.concat({name: pd.concat(units) for name, units in columns.items()}, axis=1, join="inner")
    return right
