"""Ingest: a JUMP-shaped bucket becomes tiles.

One Ray Data pipeline, in which plates overlap freely:

    plates ──► measure (bounds, illumination; one task per plate) ──► shards ──► render (read, prepare, write one shard)
                                                                                   │ one row per site
    driver: counts, progress, quarantine share; a plate is finished when its last row is in  ◄──┘
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import ray
from numpy.typing import NDArray
from ray.exceptions import RayTaskError

from coda_ray.config import POOL, Config, Ingest
from coda_ray.jump.layout import METADATA, PlateName, find_image_list, map_address, parse_image_list
from coda_ray.jump.plates import IlluminationFunctions, PlateFacts, measure_plate
from coda_ray.jump.prepare import BadImageError, correct, preparation_of, read_image, reduction, stretch, tile_shape
from coda_ray.jump.tables import ANNOTATIONS, Tables, annotate, choose_plates, read_tables, well_notes
from coda_ray.storage import Folder, open_place
from coda_ray.tiles.store import INDEX_SCHEMA, QUARANTINE_SCHEMA, TileStore

# Notes that a summary prints; `plate.json` of each plate holds its own.
_NOTES_SHOWN = 20
# Sites after which the share of quarantined ones is judged during the run.
MIN_SITES_TO_JUDGE = 20
# What a render task hands back per site: an index row, or a quarantine row where `reason` is set. The facts of a plate
# travel with the first row of its first shard.
_SITE_SCHEMA = pa.schema(
    [("plate_number", pa.int32()), ("facts", pa.string()), ("bytes_read", pa.int64()), *INDEX_SCHEMA]
    + [field for field in QUARANTINE_SCHEMA if field.name not in INDEX_SCHEMA.names]
)


class IngestError(RuntimeError):
    """An ingest that stopped; its text says why and what to do."""


@dataclass
class Progress:
    """Where a run stands."""

    sites_total: int
    plates_total: int
    sites_done: int = 0
    plates_done: int = 0
    quarantined: int = 0
    bytes_read: int = 0
    started: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class IngestSummary:
    """What a run did.

    Parameters
    ----------
    store
        Address of the tile store.
    plates
        Plates finished by this run.
    plates_before
        Chosen plates that were finished already.
    annotated
        How many of those got other compounds, controls or labels, because the tables have changed.
    left_out
        Chosen plates without an image list that can be read.
    tiles
        Tiles written by this run.
    quarantined
        Reason → sites set aside by this run.
    bytes_read
        Bytes of images read.
    seconds
        Duration.
    notes
        What people should know: absent lists, wells and illumination functions, missing tables.
    """

    store: str
    plates: int
    plates_before: int
    annotated: int
    left_out: int
    tiles: int
    quarantined: dict[str, int]
    bytes_read: int
    seconds: float
    notes: tuple[str, ...]

    def text(self) -> str:
        """Several lines for people."""
        notes = [f"{self.annotated} finished plates were annotated anew from the tables"] if self.annotated else []
        if self.left_out:
            notes.append(f"{self.left_out} chosen plates were left out: no image list of theirs can be read")
        notes += self._note_lines()
        if not self.plates:
            nothing = "no image to read" if self.annotated else "nothing to do"
            return "\n".join([f"{nothing}: {self.plates_before} plates are in {self.store}", *notes])
        took = max(self.seconds, 1e-9)
        bad = sum(self.quarantined.values())
        sites = self.tiles + bad
        lines = [
            f"{self.plates} plates, {sites} sites in {self.seconds:.1f} s: {sites / took:.1f} sites/s, "
            f"{self.bytes_read / 1e6 / took:.1f} MB/s read; tiles are in {self.store}"
        ]
        if self.plates_before:
            lines.append(f"{self.plates_before} plates were finished before")
        lines.append(f"{bad} sites quarantined" + (":" if bad else ""))
        lines += [f"  {count:6d}  {reason}" for reason, count in _worst(self.quarantined)]
        return "\n".join(lines + notes)

    def _note_lines(self) -> list[str]:
        """Give the first of many notes, a line each."""
        lines = [f"note: {note}" for note in self.notes[:_NOTES_SHOWN]]
        more = len(self.notes) - len(lines)
        return lines + ([f"{more} further notes are in the plate.json files of the store"] if more else [])


@dataclass
class _Plate:
    """One plate on its way: the listed sites, and the rows that have come back."""

    name: PlateName
    sites: pd.DataFrame
    notes: list[str]
    arrived: list[pa.Table] = field(default_factory=list)
    missing: int = 0


@dataclass(frozen=True)
class _Work:
    """What every task of a run needs; plates are in the object store, one reference each."""

    plates: list[Any]
    bucket: Folder
    store: TileStore
    ingest: Ingest
    pixel_sizes: dict[str, float]


def run_ingest(config: Config, report: Callable[[Progress], None]) -> IngestSummary:
    """Prepare the tiles of every chosen plate that is not finished yet.

    Finished plates are annotated anew, without their images, where the tables have come or changed since.

    Parameters
    ----------
    config
        The configuration; `bucket`, `metadata`, `tiles` and `ingest` matter. Ray must be running.
    report
        Called with the state of the run whenever sites come in.

    Returns
    -------
    IngestSummary

    Raises
    ------
    IngestError
        When more sites are quarantined than `ingest.max_bad_share` allows, when there is nothing to read, or when storage
        refuses to answer.
    ValueError
        When a table or a choice of plates is wrong.
    """
    bucket = open_place(config.bucket)
    store = TileStore.open(open_place(config.tiles), preparation_of(config))
    tables = read_tables(open_place(config.metadata))
    notes = list(tables.notes)
    own = config.ingest.image_list is not None
    lists = _own_list(bucket, config.ingest) if own else dict.fromkeys(_chosen(tables, config.ingest))
    before = {
        name: facts for name in lists if (facts := store.folder.read_json(f"{store.plate_path(*name)}/plate.json")) is not None
    }
    todo = [name for name in lists if name not in before]
    _check_sources(todo)
    _check_pixel_sizes(todo, tables, config.ingest)
    plates = [_Plate(name, rows, []) for name in todo if (rows := lists[name]) is not None]
    if not own:
        plates = _read_lists(bucket, config.ingest, todo, notes)
    if not plates and not before:
        raise IngestError("no image list was found for any chosen plate; " + "; ".join(notes[:3]))
    annotated = _annotate_finished({name: lists[name] for name in before}, store, tables, config.ingest.threads)
    for plate in plates:
        _complete(plate, tables, bucket, config.ingest)
    run = _Run(plates, store, config.ingest.max_bad_share, list(before.values()), report)
    if plates:
        for block in _pipeline(plates, bucket, store, config.ingest, tables):
            run.take(block)
        run.check_complete()
    return run.summary(notes, left_out=len(todo) - len(plates), annotated=annotated)


def _chosen(tables: Tables, ingest: Ingest) -> list[PlateName]:
    """Plates of the plate table that the configuration asks for."""
    return choose_plates(tables.plates, ingest.sources, ingest.plate_types, ingest.plates)


def _own_list(bucket: Folder, ingest: Ingest) -> dict[PlateName, pd.DataFrame]:
    """Read a hand-made image list, plate by plate."""
    address = cast(str, ingest.image_list)
    try:
        table = parse_image_list(bucket.read_address(address), address, ingest.channels, ANNOTATIONS)
    except FileNotFoundError:
        raise IngestError(f"ingest.image_list = {address!r}: there is no such file; correct the path") from None
    for column in METADATA:
        if column not in table or table[column].isna().any():
            raise IngestError(f"{address}: column {column} is missing or has empty cells; fill it in for every row")
    for column, wanted, option in ((METADATA[0], ingest.sources, "sources"), (METADATA[2], ingest.plates, "plates")):
        unknown = sorted(set(wanted) - set(table[column]))
        if unknown:
            raise IngestError(f"ingest.{option} = {unknown[0]!r}: {address} does not list it; correct the option")
        table = table[table[column].isin(wanted)] if wanted else table
    groups = table.groupby(list(METADATA[:3]), sort=True)
    return {PlateName(*map(str, cast(tuple[Any, ...], name))): rows for name, rows in groups}


def _read_lists(bucket: Folder, ingest: Ingest, names: Sequence[PlateName], notes: list[str]) -> list[_Plate]:
    """Read the image lists of plates; a plate without a readable one is noted."""

    def read(name: PlateName) -> pd.DataFrame | str:
        path = find_image_list(bucket, ingest.dataset, name)
        if path is None:
            return "no image list in the bucket"
        try:
            table = parse_image_list(bucket.read(path), bucket.address(path), ingest.channels)
        except ValueError as error:
            return str(error)
        return table.assign(**dict(zip(METADATA, name, strict=False)))

    plates = []
    with ThreadPoolExecutor(ingest.threads) as pool:
        for name, found in zip(names, pool.map(read, names), strict=True):
            if isinstance(found, str) or not len(found):
                notes.append(f"{'/'.join(name)}: {found if isinstance(found, str) else 'its image list is empty'}; left out")
            else:
                plates.append(_Plate(name, found, []))
    return plates


def _check_sources(names: Sequence[PlateName]) -> None:
    """Refuse a source whose name reads as a pool of labs."""
    pooled = next((name.source for name in names if POOL in name.source), None)
    if pooled is not None:
        raise IngestError(
            f"Metadata_Source = {pooled!r}: {POOL} stands between the labs of a pool, and in no lab's name; rename the source"
        )


def _check_pixel_sizes(names: Sequence[PlateName], tables: Tables, ingest: Ingest) -> None:
    """Refuse one pixel size for all where the microscope of a source is not known."""
    unknown = sorted({name.source for name in names} - set(tables.pixel_sizes))
    if ingest.pixel_size_um is not None and unknown:
        raise IngestError(
            f"ingest.pixel_size_um = {ingest.pixel_size_um}: microscope_config.csv has no pixel size of {unknown[0]!r}; "
            "add it there, or unset the option"
        )


def _annotate_finished(lists: Mapping[PlateName, pd.DataFrame | None], store: TileStore, tables: Tables, threads: int) -> int:
    """Bring the annotations of finished plates up to date, and count the plates that changed.

    A column of which tables and list say nothing at all stays: they were there once, and are not at hand today.
    """

    def update(name: PlateName) -> bool:
        path, listed = store.plate_path(*name), lists[name]
        index = store.plate_index(path)
        sites = index[list(METADATA)]
        if listed is not None:
            given = [column for column in ANNOTATIONS if column in listed]
            sites = sites.merge(listed[[*METADATA, *given]].drop_duplicates(list(METADATA)), how="left")
        now = annotate(sites, tables)[list(ANNOTATIONS)].dropna(axis="columns", how="all") if len(sites) else sites[[]]
        if now.fillna("").eq(index[list(now)].fillna("")).to_numpy().all():
            return False
        store.write_plate_index(path, index.assign(**now))
        return True

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(update, lists))


def _complete(plate: _Plate, tables: Tables, bucket: Folder, ingest: Ingest) -> None:
    """Put a plate's rows in order, join the tables, map addresses, and mark rows that cannot become a tile."""
    rows = plate.sites.reset_index(drop=True)
    order = pd.DataFrame({"well": rows["Metadata_Well"], "site": rows["Metadata_Site"].str.zfill(6)})
    rows = rows.loc[order.sort_values(["well", "site"], kind="stable").index].reset_index(drop=True)
    annotated = annotate(rows, tables)
    plate.notes += well_notes(rows, annotated, tables)
    reason = pd.Series(None, index=rows.index, dtype="str")
    channel = reason.copy()
    for name in ingest.channels:
        column = f"Orig_{name}"
        unlisted = annotated[column].isna() if column in annotated else pd.Series(True, index=rows.index)
        first = unlisted & reason.isna()
        reason[first], channel[first] = f"channel {name} is not listed", name
        for kind in ("Orig", "Illum"):
            if f"{kind}_{name}" in annotated:
                mapped = annotated[f"{kind}_{name}"].map(lambda a: map_address(a, ingest.listed_as, bucket), na_action="ignore")
                annotated[f"{kind}_{name}"] = mapped
    twice = annotated.duplicated(["Metadata_Well", "Metadata_Site"])
    reason[twice], channel[twice] = "site is listed more than once; the first row was taken", None
    plate.sites = annotated.assign(reason=reason, channel=channel)
    plate.missing = len(plate.sites)


def _pipeline(plates: Sequence[_Plate], bucket: Folder, store: TileStore, ingest: Ingest, tables: Tables) -> Iterator[pa.Table]:
    """Run the Ray Data pipeline and give the rows of each shard as it is written."""
    work = _Work([ray.put(plate.sites) for plate in plates], bucket, store, ingest, dict(tables.pixel_sizes))
    names = [plate.name for plate in plates]
    context = ray.data.DataContext.get_current().copy()
    # So that a storage error arrives here with its own message.
    context.raise_original_map_exception = True
    with ray.data.DataContext.current(context):
        rows = ray.data.from_items([{"plate_number": i} for i in range(len(plates))], override_num_blocks=len(plates))
    shards = rows.flat_map(partial(_measure, work, names), num_cpus=ingest.cpus_per_task)
    shards = shards.repartition(target_num_rows_per_block=1)
    sites = shards.map_batches(
        partial(_render, work, names), batch_size=None, batch_format="pyarrow", num_cpus=ingest.cpus_per_task
    )
    try:
        yield from sites.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    except RayTaskError as error:
        raise IngestError(f"{_cause(error)}; mend it and run the ingest again: finished plates are kept") from error


def _cause(error: BaseException) -> str:
    """Message of the innermost error."""
    while (inner := getattr(error, "cause", None) or error.__cause__) is not None:
        error = inner
    # Ray Data appends advice about its own retries.
    return f"{type(error).__name__}: {error}".partition("\nFailed to ")[0]


def _measure(work: _Work, names: Sequence[PlateName], row: dict[str, Any]) -> list[dict[str, Any]]:
    """Task: measure one plate, and cut its sites into shards."""
    number, ingest = row["plate_number"], work.ingest
    name, sites = names[number], ray.get(work.plates[number])
    healthy = sites[sites["reason"].isna()]
    factor = reduction(ingest, work.pixel_sizes.get(name.source))
    facts = measure_plate(healthy, name, work.bucket, work.store, ingest, factor)
    shards = range(-(-len(sites) // ingest.tiles_per_shard))
    return [{"plate_number": number, "shard": shard, "facts": facts.to_json()} for shard in shards]


def _render(work: _Work, names: Sequence[PlateName], jobs: pa.Table) -> pa.Table:
    """Task: read, prepare and write the tiles of one shard."""
    tables = []
    for job in jobs.to_pylist():
        number, shard = job["plate_number"], job["shard"]
        start = shard * work.ingest.tiles_per_shard
        sites = ray.get(work.plates[number]).iloc[start : start + work.ingest.tiles_per_shard]
        rendered = _render_shard(sites.reset_index(drop=True), names[number], shard, PlateFacts.from_json(job["facts"]), work)
        rendered["plate_number"], rendered["facts"] = number, None
        if shard == 0:
            rendered.loc[0, "facts"] = job["facts"]
        rendered = rendered.reindex(columns=_SITE_SCHEMA.names)
        tables.append(pa.Table.from_pandas(rendered, schema=_SITE_SCHEMA, preserve_index=False))
    return pa.concat_tables(tables)


def _render_shard(sites: pd.DataFrame, name: PlateName, shard: int, facts: PlateFacts, work: _Work) -> pd.DataFrame:
    """Prepare the sites of one shard side by side; one row per site, with its place or its reason."""
    site = _SiteRenderer(name, facts, work)
    healthy = sites.index[sites["reason"].isna()]
    with ThreadPoolExecutor(work.ingest.threads) as pool:
        results = list(pool.map(site.render, sites.loc[healthy].to_dict("records")))
    rows = sites[[*METADATA, *ANNOTATIONS, "reason", "channel"]].copy()
    rows["address"], rows["bytes_read"] = None, 0
    rows.loc[healthy, "bytes_read"] = [result.bytes_read for result in results]
    for index, result in zip(healthy, results, strict=True):
        if result.tile is None:
            rows.loc[index, ["reason", "channel", "address"]] = [result.reason, result.channel, result.address]
    tiles = [result.tile for result in results if result.tile is not None]
    if not tiles:
        return rows
    written = work.store.write_shard(work.store.plate_path(*name), shard, np.stack(tiles))
    raw_um = work.pixel_sizes.get(name.source)
    if raw_um is not None and facts.shape is not None:
        written["pixel_size_um"] = raw_um * facts.shape[0] / written["height"]
    written.index = pd.Index([i for i, result in zip(healthy, results, strict=True) if result.tile is not None])
    return rows.join(written)


@dataclass(frozen=True)
class _Rendered:
    """A tile, or the reason why there is none."""

    tile: NDArray[np.uint8] | None
    bytes_read: int
    reason: str | None = None
    channel: str | None = None
    address: str | None = None


class _SiteRenderer:
    """Makes the tile of one site after the other, with the facts of their plate."""

    def __init__(self, name: PlateName, facts: PlateFacts, work: _Work) -> None:
        self.facts, self.work = facts, work
        self.functions = IlluminationFunctions(work.bucket, work.store, name)
        factor = reduction(work.ingest, work.pixel_sizes.get(name.source))
        self.shape = tile_shape(facts.shape, factor) if facts.shape else None

    def render(self, site: dict[str, Any]) -> _Rendered:
        """Read and prepare the wanted channels of a site."""
        channels, size = [], 0
        for channel in self.work.ingest.channels:
            address = site[f"Orig_{channel}"]
            try:
                data = self.work.bucket.read_address(address)
                size += len(data)
                channels.append(self._prepare(data, channel, site))
            except FileNotFoundError:
                return _Rendered(None, size, "file is missing", channel, address)
            except BadImageError as error:
                return _Rendered(None, size, str(error), channel, address)
        return _Rendered(np.stack(channels), size)

    def _prepare(self, data: bytes, channel: str, site: dict[str, Any]) -> NDArray[np.uint8]:
        """One channel: decode, correct, stretch."""
        image = read_image(data)
        if self.shape is None or image.shape != self.facts.shape:
            plate = "x".join(map(str, self.facts.shape or ()))
            raise BadImageError(f"image is {image.shape[0]}x{image.shape[1]} px, those of its plate {plate or 'unknown'}")
        if channel not in self.facts.caps:
            raise BadImageError(f"no sampled image of channel {channel} has its plate's shape, so its brightness is unknown")
        listed = site.get(f"Illum_{channel}")
        used = self.facts.illumination[channel][listed if isinstance(listed, str) else ""]
        corrected = correct(image, self.functions.get(channel, used), self.shape)
        return stretch(corrected, self.work.ingest.clip_percentiles, self.facts.caps[channel])


class _Run:
    """The driver's side: collects rows, judges the quarantined share, finishes plates."""

    def __init__(
        self,
        plates: Sequence[_Plate],
        store: TileStore,
        max_bad_share: float,
        before: Sequence[dict[str, Any]],
        report: Callable[[Progress], None],
    ) -> None:
        self.plates, self.store, self.max_bad_share, self.report = plates, store, max_bad_share, report
        self.progress = Progress(sum(plate.missing for plate in plates), len(plates))
        self.reasons: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.whole: list[_Plate] = []
        self.plates_before = len(before)
        self.bad_before = sum(int(facts["quarantined"]) for facts in before)
        self.sites_before = self.bad_before + sum(int(facts["tiles"]) for facts in before)

    def take(self, block: pa.Table) -> None:
        """Count the rows of some shards, and finish the plates that they complete."""
        if not block.num_rows:
            return
        self.progress.bytes_read += sum(block["bytes_read"].to_pylist())
        self.progress.sites_done += block.num_rows
        for row in block.filter(block["reason"].is_valid()).to_pylist():
            self.reasons[row["reason"]] += 1
            self.examples.setdefault(row["reason"], row["address"] or "/".join(row[name] for name in METADATA))
            self.progress.quarantined += 1
        numbers = block["plate_number"].to_numpy()
        for number in np.unique(numbers):
            plate = self.plates[number]
            rows = block.filter(pa.array(numbers == number))
            plate.arrived.append(rows)
            plate.missing -= rows.num_rows
            if plate.missing == 0:
                self.whole.append(plate)
        if self._judge():
            while self.whole:
                self._finish(self.whole.pop())
        self.report(self.progress)

    def check_complete(self) -> None:
        """Every plate must have come back whole."""
        lost = [plate.name for plate in self.plates if plate.missing]
        if lost:
            raise IngestError(f"{'/'.join(lost[0])}: {len(lost)} plates did not come back whole; run the ingest again")

    def summary(self, notes: list[str], left_out: int, annotated: int) -> IngestSummary:
        """Sum up."""
        seconds = time.monotonic() - self.progress.started
        notes = notes + [f"{'/'.join(plate.name)}: {note}" for plate in self.plates for note in plate.notes]
        tiles = self.progress.sites_done - self.progress.quarantined
        return IngestSummary(
            store=self.store.folder.address(),
            plates=self.progress.plates_done,
            plates_before=self.plates_before,
            annotated=annotated,
            left_out=left_out,
            tiles=tiles,
            quarantined=dict(self.reasons),
            bytes_read=self.progress.bytes_read,
            seconds=seconds,
            notes=tuple(notes),
        )

    def _judge(self) -> bool:
        """Stop the run where too much is broken; tell whether enough was seen to say that it is not."""
        bad, seen = self.bad_before + self.progress.quarantined, self.sites_before + self.progress.sites_done
        if seen < MIN_SITES_TO_JUDGE and self.progress.sites_done < self.progress.sites_total:
            return False
        if bad > self.max_bad_share * seen:
            worst = "; ".join(f"{n} × {reason}, as {self.examples[reason]}" for reason, n in _worst(self.reasons)[:5])
            raise IngestError(
                f"stopped: {bad} of the {seen} sites seen so far were quarantined, more than ingest.max_bad_share = "
                f"{self.max_bad_share}: {worst}; {self._keep_quarantine()}; mend the data, or raise the share to accept the loss"
            )
        return True

    def _keep_quarantine(self) -> str:
        """Write what was set aside of the unfinished plates beside their shards, and tell where."""
        tables = [(plate, rows[rows["reason"].notna()]) for plate in self.plates if plate.arrived for rows in [_rows(plate)]]
        written = [self.store.write_quarantine(self.store.plate_path(*plate.name), bad) for plate, bad in tables if len(bad)]
        more = f" and {len(written) - 1} like it beside other plates' shards" if len(written) > 1 else ""
        return f"the sites are in {written[0]}{more}" if written else "the sites are in quarantine.parquet of the finished plates"

    def _finish(self, plate: _Plate) -> None:
        """Write a plate's tables; from now on it counts."""
        rows = _rows(plate)
        plate.arrived.clear()
        good = rows["reason"].isna()
        index = rows[good].sort_values(["shard", "row"])
        facts = PlateFacts.from_json(rows["facts"].dropna().item())
        plate.notes += facts.notes
        note = {**asdict(facts), "notes": plate.notes}
        self.store.finish_plate(self.store.plate_path(*plate.name), index, rows[~good], note)
        self.progress.plates_done += 1


def _rows(plate: _Plate) -> pd.DataFrame:
    """Rows of a plate that have come back, in the order of wells."""
    rows: pd.DataFrame = pa.concat_tables(plate.arrived).to_pandas()
    return rows.sort_values(["Metadata_Well", "Metadata_Site", "row"], kind="stable")


def _worst(reasons: "dict[str, int] | Counter[str]") -> list[tuple[str, int]]:
    """Reasons, the most frequent first."""
    return sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
