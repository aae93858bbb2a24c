"""The dry run of a matrix: its stages, counted and not run.

It plans with the functions of the real run. What that reads of the tile store are the indexes of its plates; here they stand in a
temporary folder: copies of those that are there, and, for plates that are not ingested yet, what the metadata tables say.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
from rich.table import Table

from coda_ray.config import Config, Place, labs_of, told_in_one_line
from coda_ray.jump.layout import PlateName
from coda_ray.jump.planned import planned_index
from coda_ray.jump.prepare import preparation_of, reduction, tile_shape
from coda_ray.jump.tables import Tables, choose_plates, read_tables
from coda_ray.learn.mae import MaeObjective
from coda_ray.learn.objectives import DinoObjective
from coda_ray.pipeline import data, networks
from coda_ray.pipeline.profile import WELL_ID
from coda_ray.pipeline.request import Request
from coda_ray.pipeline.stage import Stage
from coda_ray.pipeline.train_stages import loss_of, trained_whole
from coda_ray.pipeline.transfer import plan, stages_of
from coda_ray.progress import job_console
from coda_ray.storage import Folder, open_place
from coda_ray.tiles.store import COMPOUND, LABEL, TileStore
from coda_ray.training.checkpoints import KEEP

WIDTH = 190
RAW_BYTES_PER_PIXEL = 2
FLOAT_BYTES = 4
SUM_BYTES = 8
# How the fields of section estimate that say a speed end.
PER_S = "_per_s"
# Stages that leave no weights, and so have no checkpoints: tiles go through a network once.
PASSES = ("evaluate", "moments")
PLANNED, UNKNOWN = "~", "–"
STAGE_COLUMNS = [
    "kind", "title", "source", "plates", "tiles", "steps", "minibatch", "images_per_step", "images", "gpu_hours", "bytes",
    "finished", "planned", "number", "needs",
]  # fmt: skip


@dataclass(frozen=True)
class Survey:
    """What a matrix would take.

    Parameters
    ----------
    sources
        One row per source: plates, batches, wells, compounds, classes, labelled (tiles), tiles, tile_px, tile_bytes; of them
        planned (plates that are not ingested yet) and raw_bytes (of the raw images to read for them); held_out, the plate that is
        never trained on (empty where nothing is learnt from the source).
    stages
        One row per stage, in an order in which each stands after those it needs: kind, title, source, plates, tiles, steps,
        minibatch, images_per_step, images, gpu_hours (spent by a finished stage), bytes (of its results), finished, planned
        (whether its source has planned plates), number and needs (numbers of the stages that it stands on). Missing where it was
        not counted, or no rate is known.
    rates
        Kind of work → samples per second and GPU, and where that is from.
    checkpoint_bytes
        Most that one running stage keeps in checkpoints besides.
    warnings
        What should be known before the stages that are not finished start.
    """

    sources: pd.DataFrame
    stages: pd.DataFrame
    rates: dict[str, tuple[float, str]]
    checkpoint_bytes: int
    warnings: tuple[str, ...]


def survey(config: Config, requests: Sequence[Request]) -> Survey:
    """Count what some requests would take; no Ray, no image, and nothing is written outside a temporary folder.

    Parameters
    ----------
    config
        Settings; `estimate` holds what is assumed.
    requests
        Cells of the matrix.

    Returns
    -------
    Survey

    Raises
    ------
    DataError
        As the real run, and where a source is neither ingested nor can be planned.
    """
    names = sorted({lab for request in requests for name in (request.source, request.target) for lab in labs_of(name)})
    with TemporaryDirectory() as folder:
        planning = config.model_copy(update={"tiles": Place(address=folder)})
        planned = _write_indexes(config, names, open_place(planning.tiles))
        stages = stages_of(transfer for request in requests for transfer in plan(planning, request))
        sources = pd.DataFrame([_source_row(planning, name, planned[name]) for name in names])
        held_out = {lab: plate for r in requests for lab, plate in data.held_out_plates(planning, r.source).items()}
        sources["held_out"] = [held_out.get(name, "") for name in names]
    results = open_place(config.results)
    facts = {stage.key: stage.facts(results) for stage in stages}
    rates = _rates(config, stages, facts)
    sizes = _Sizes(config)
    numbers = {stage.key: number for number, stage in enumerate(stages, 1)}
    rows = [
        _stage_row(stage, facts[stage.key], rates, sizes, planned)
        | {"number": numbers[stage.key], "needs": [numbers[need.key] for need in stage.needs]}
        for stage in stages
    ]
    largest = max(sizes.checkpoints(stage) for stage in stages)
    warnings = tuple(dict.fromkeys(stage.note for stage in stages if stage.note and facts[stage.key] is None))
    return Survey(sources, pd.DataFrame(rows, columns=STAGE_COLUMNS), rates, largest, warnings)


def show(config: Config, requests: Sequence[Request]) -> int:
    """Print a survey.

    Returns
    -------
    int
        0.

    Raises
    ------
    SystemExit
        With code 2 when the matrix cannot be planned as configured.
    """
    console = job_console(WIDTH)
    with told_in_one_line(sys.argv[0]):
        found = survey(config, requests)
    for table in (_sources_table(found), _stages_table(found), _totals_table(found)):
        console.print(table)
    for line in (*_places(config), *_notes(found)):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    return 0


def _write_indexes(config: Config, sources: Sequence[str], folder: Folder) -> dict[str, int]:
    """Fill a tile store with indexes alone, and count the planned plates of each source."""
    store = TileStore.open(open_place(config.tiles), preparation_of(config))
    indexes = TileStore.open(folder, store.preparation)
    known = store.plates(sources)
    for path in known:
        for name in ("index.parquet", "plate.json"):
            indexes.folder.write(f"{path}/{name}", store.folder.read(f"{path}/{name}"))
    tables = read_tables(open_place(config.metadata))
    chosen = [plate for plate in _chosen(config, tables) if plate.source in sources]
    missing = [plate for plate in chosen if store.plate_path(*plate) not in known]
    for plate in missing:
        per_well, shape = _expected(config, tables, plate)
        index = planned_index(plate, tables, sites_per_well=per_well, shape=shape)
        indexes.finish_plate(store.plate_path(*plate), index, pd.DataFrame(), {"planned": True})
    planned = {source: sum(plate.source == source for plate in missing) for source in sources}
    for source in sources:
        if not planned[source] and not any(path.startswith(f"{source}/") for path in known):
            raise data.DataError(
                f"{source}: none of its plates is in {store.folder.address()}, and ingest.sources, ingest.plate_types and the "
                f"plate table in metadata.address = {config.metadata.address!r} give none to plan with; correct them, or run "
                "jobs/ingest.py first"
            )
    return planned


def _chosen(config: Config, tables: Tables) -> list[PlateName]:
    """Plates that an ingest would take from the plate table; a list of one's own is not looked into."""
    ingest = config.ingest
    if ingest.image_list is not None or tables.plates.empty:
        return []
    return choose_plates(tables.plates, ingest.sources, ingest.plate_types, ingest.plates)


def _expected(config: Config, tables: Tables, plate: PlateName) -> tuple[int, tuple[int, int]]:
    """Sites per well, and height and width (px) of a tile, of a plate that is not ingested yet."""
    source, estimate = plate.source, config.estimate
    for field, known in (("sites_per_well", estimate.sites_per_well), ("image_px", estimate.image_px)):
        if source not in known:
            raise data.DataError(
                f"estimate.{field} has no {source}, and {'/'.join(plate)} is not ingested yet; add {source} there, or run "
                "jobs/ingest.py first"
            )
    factor = reduction(config.ingest, tables.pixel_sizes.get(source))
    return estimate.sites_per_well[source], tile_shape(estimate.image_px[source], factor)


def _source_row(config: Config, source: str, planned: int) -> dict[str, Any]:
    """Describe the tiles of one source."""
    index = data.load_tiles(config, source)
    frame = index.frame
    pixels = frame["height"].astype("int64") * frame["width"]
    height, width = frame[["height", "width"]].iloc[0]
    raw = 0
    if planned:
        raw_height, raw_width = config.estimate.image_px[source]
        ahead = frame["shard"].str.endswith("/planned").sum()
        raw = int(ahead) * raw_height * raw_width * RAW_BYTES_PER_PIXEL * len(index.channels)
    return {
        "source": source,
        "plates": index.count("plate"),
        "batches": index.count("batch"),
        "wells": len(frame[WELL_ID].drop_duplicates()),
        "compounds": frame[COMPOUND].nunique(),
        "classes": frame[LABEL].nunique(),
        "labelled": int(frame[LABEL].notna().sum()),
        "tiles": len(frame),
        "tile_px": f"{height} × {width}",
        "tile_bytes": int(pixels.sum()) * len(index.channels),
        "planned": planned,
        "raw_bytes": raw,
    }


def _stage_row(
    stage: Stage,
    facts: dict[str, Any] | None,
    rates: dict[str, tuple[float, str]],
    sizes: "_Sizes",
    planned: dict[str, int],
) -> dict[str, Any]:
    """Describe one stage."""
    row: dict[str, Any] = {"kind": stage.kind, "title": stage.title, "finished": facts is not None, "planned": False}
    work, hours = stage.workload, float("nan")
    if work is None:
        return {**row, "gpu_hours": 0.0}
    if facts is not None:
        hours = facts["seconds"] * facts.get("workers", 1) / 3600
    elif work.rate in rates:
        hours = work.samples / rates[work.rate][0] / 3600
    return row | {
        "source": work.source,
        "plates": work.plates,
        "tiles": work.tiles,
        "steps": work.steps,
        "minibatch": work.minibatch,
        "images_per_step": work.minibatch * work.tiles_per_sample,
        "images": work.samples * work.tiles_per_sample,
        "gpu_hours": hours,
        "bytes": sizes.results(stage),
        "planned": any(planned[lab] for lab in labs_of(work.source)),
    }


def _rates(config: Config, stages: Sequence[Stage], facts: dict[str, dict[str, Any] | None]) -> dict[str, tuple[float, str]]:
    """Samples per second and GPU of each kind of work: the median of finished stages, else what the configuration assumes."""
    measured: dict[str, list[float]] = {}
    for stage in stages:
        done, work = facts[stage.key], stage.workload
        # An evaluation that was resumed counts the seconds of its last part alone, so it does not tell.
        if done and work and stage.kind != "evaluate" and done["seconds"]:
            measured.setdefault(work.rate, []).append(work.samples / (done["seconds"] * done.get("workers", 1)))
    rates = {rate: (median(values), f"median of {len(values)} finished stages") for rate, values in measured.items()}
    for field in (name for name in type(config.estimate).model_fields if name.endswith(PER_S)):
        assumed = getattr(config.estimate, field)
        if assumed is not None:
            rates.setdefault(field.removesuffix(PER_S), (assumed, f"assumed, estimate.{field}"))
    return rates


class _Sizes:
    """Bytes that stages leave, counted on networks without trained weights."""

    def __init__(self, config: Config) -> None:
        self.config = networks.unfilled(config)
        self.extractor, self.classifier = cache(self._extractor), cache(self._classifier)

    def results(self, stage: Stage) -> int:
        """Bytes of the result: weights, predictions and embeddings, or sums over the tokens of each plate."""
        if stage.workload is None:
            return 0
        if stage.kind not in PASSES:
            return self._weights(stage)[0]
        classes = len(stage.needs[0].inputs["classes"])
        width = self.classifier(classes, False)[2]
        if stage.kind == "moments":
            return stage.workload.plates * SUM_BYTES * (1 + 4 * width)
        return stage.workload.tiles * FLOAT_BYTES * (classes + width)

    def checkpoints(self, stage: Stage) -> int:
        """Bytes of the checkpoints while it runs: weights and AdamW's two moments, in each."""
        if stage.workload is None or stage.kind in PASSES:
            return 0
        saved, trained = self._weights(stage)[:2]
        return KEEP * (saved + 2 * trained)

    def _weights(self, stage: Stage) -> tuple[int, int, int]:
        """Bytes that are saved and bytes that are trained, and the width of a token."""
        if stage.kind == "classify":
            return self.classifier(len(stage.inputs["classes"]), bool(stage.needs))
        if trained_whole(stage):
            return self._weights(stage.needs[0])
        return self.extractor(loss_of(stage) == "mae")

    def _extractor(self, masked: bool) -> tuple[int, int, int]:
        channels = len(self.config.ingest.channels)
        objective: DinoObjective | MaeObjective
        if masked:
            objective = networks.mae_objective(self.config, channels=channels, seed=0)
        else:
            objective = networks.dino_objective(self.config, channels=channels, steps=1, steps_per_epoch=1, seed=0)
        trained = sum(p.nbytes for p in objective.network.parameters() if p.requires_grad)
        return sum(t.nbytes for t in objective.state_dict().values()), trained, 0

    def _classifier(self, classes: int, dual: bool) -> tuple[int, int, int]:
        channels = len(self.config.ingest.channels)
        model = networks.classifier_model(self.config, channels=channels, classes=classes, dual=dual)
        trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        return sum(t.nbytes for t in model.state_dict().values()), trained, model.head.in_features


def _sources_table(found: Survey) -> Table:
    """Lay out the sources."""
    table = Table(title="sources")
    names = [
        "source",
        "plates",
        "batches",
        "wells",
        "compounds",
        "classes",
        "labelled",
        "tiles",
        "tile px",
        "tile store GB",
        "raw GB",
        "held out",
    ]
    _columns(table, names)
    for row in found.sources.to_dict("records"):
        counts = [_count(row[name]) for name in ("batches", "wells", "compounds", "classes", "labelled")]
        mark = PLANNED if row["planned"] else ""
        sizes = [row["tile_px"], f"{mark}{row['tile_bytes'] / 1e9:.1f}", _count(row["raw_bytes"] / 1e9)]
        plates = f"{row['plates']}" + (f" ({row['planned']} {PLANNED})" if row["planned"] else "")
        table.add_row(row["source"], plates, *counts, f"{mark}{_count(row['tiles'])}", *sizes, row["held_out"])
    total = found.sources[["tile_bytes", "raw_bytes"]].sum() / 1e9
    ends = [_count(found.sources["labelled"].sum()), _count(found.sources["tiles"].sum()), ""]
    table.add_section()
    table.add_row(
        "all", _count(found.sources["plates"].sum()), *[""] * 4, *ends, f"{total['tile_bytes']:.1f}", _count(total["raw_bytes"])
    )
    return table


def _stages_table(found: Survey) -> Table:
    """Lay out the stages, in an order in which each stands after those it needs."""
    table = Table(title="stages")
    names = ["stage", "#", "needs", "plates", "tiles", "steps", "mini-batch", "images/step", "images", "GPU h", "MB", "state"]
    _columns(table, names)
    for row in found.stages.to_dict("records"):
        mark = PLANNED if row["planned"] else ""
        counts = [_count(row[name]) for name in ("steps", "minibatch", "images_per_step", "images")]
        costs = [_hours(row["gpu_hours"]), _count(row["bytes"] / 1e6)]
        state = "finished" if row["finished"] else ""
        order = [str(row["number"]), ", ".join(map(str, row["needs"]))]
        table.add_row(row["title"], *order, _count(row["plates"]), f"{mark}{_count(row['tiles'])}", *counts, *costs, state)
    return table


def _totals_table(found: Survey) -> Table:
    """Sum up, per kind of stage and over all."""
    table = Table(title="totals")
    names = ["kind", "stages", "finished", "steps", "images", "GPU h spent", "GPU h to go", "results GB"]
    _columns(table, names)
    kinds = [(kind, found.stages[found.stages["kind"] == kind]) for kind in found.stages["kind"].unique()]
    for number, (kind, rows) in enumerate([*kinds, ("all", found.stages)]):
        if number == len(kinds):
            table.add_section()
        done, todo = rows[rows["finished"]], rows[~rows["finished"]]
        hours = [_hours(part["gpu_hours"].sum(skipna=False)) for part in (done, todo)]
        sums = [_count(rows[name].sum()) for name in ("steps", "images")]
        table.add_row(kind, str(len(rows)), str(len(done)), *sums, *hours, f"{rows['bytes'].sum() / 1e9:.1f}")
    return table


def _places(config: Config) -> list[str]:
    """Say where everything is read and written."""
    sections = {"images": config.bucket, "metadata": config.metadata, "tiles": config.tiles, "results": config.results}
    return [f"{name}: {place.address}" for name, place in sections.items()]


def _notes(found: Survey) -> list[str]:
    """Say what is known, what is planned, and what the hours stand on."""
    plates, planned = found.sources[["plates", "planned"]].sum()
    known = f"{plates - planned} plates are in the tile store"
    notes = [f"{known}; {planned} are planned from the metadata tables, every listed well whole ({PLANNED})"]
    speeds = {rate: f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}" for rate, (speed, _) in found.rates.items()}
    notes += [f"{rate}: {speeds[rate]} samples/s per GPU ({origin})" for rate, (_, origin) in found.rates.items()]
    if found.stages["gpu_hours"].isna().any():
        notes.append(f"GPU h {UNKNOWN}: no rate is known; give estimate.dino_per_s and its like")
    uncounted = int(found.stages["tiles"].isna().sum())
    if uncounted:
        notes.append(f"{uncounted} stages that take no GPU (corrections, profiles) were not counted")
    notes.append(f"each running stage keeps up to {found.checkpoint_bytes / 1e9:.1f} GB of checkpoints besides")
    return [*notes, *found.warnings]


def _columns(table: Table, names: Sequence[str]) -> None:
    """Add columns, names to the left and numbers to the right."""
    for name in names:
        table.add_column(name, justify="left" if name == names[0] else "right", overflow="fold")


def _count(value: float) -> str:
    """A count, or what stands for an unknown one."""
    return UNKNOWN if pd.isna(value) else f"{value:,.0f}"


def _hours(value: float) -> str:
    """Hours, or what stands for unknown ones."""
    return UNKNOWN if pd.isna(value) else f"{value:,.2f}" if value < 10 else f"{value:,.0f}"
