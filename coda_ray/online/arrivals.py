"""Which plates have arrived in the bucket: their image list is there, with all images that it names, and nothing changes.

Plates are found by their image lists: in the bucket, or in the notifications that S3 writes about new objects. What is known of
a plate's images comes from lists of their folders, never from a request per image.
"""

import json
import logging
import posixpath
import re
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_plus

import pandas as pd

from coda_ray.config import Config, labs_of
from coda_ray.jump.layout import LIST_FOLDERS, LIST_NAMES, METADATA, PlateName, map_address, parse_image_list
from coda_ray.jump.tables import Tables, read_tables
from coda_ray.storage import Folder, StoredFile, open_place
from coda_ray.tracking.records import READS_AT_A_TIME

log = logging.getLogger(__name__)
# A plate with images in more folders is looked at from the folder above them all, where that is its own.
MOST_FOLDERS = 8
# Parsed image lists, of about 1 MB each, that are kept from one look to the next.
LISTS_KEPT = 64
# Notifications that are in memory together.
EVENTS_AT_A_TIME = 256
_NO_LIST, _NO_IMAGE = "its image list is not there", "its image list names no image of the wanted channels"
_LIST = re.compile(r"([^/]+)/workspace/([^/]+)/([^/]+)/([^/]+)/([^/]+)")


@dataclass(frozen=True)
class Arrival:
    """A plate that may be worked on.

    Parameters
    ----------
    plate
        Its source, batch and name.
    changed
        When the newest file of its list and images was written (unix s).
    sites
        Rows of its list.
    missing
        Images of its list, of the wanted channels, that are not there or empty.
    """

    plate: PlateName
    changed: float
    sites: int
    missing: int


@dataclass(frozen=True)
class Waiting:
    """A plate that is not worked on yet, and why."""

    plate: PlateName
    reason: str


@dataclass(frozen=True)
class _Images:
    """What an image list names: its rows, and the files of each folder, by paths inside the file system."""

    sites: int
    files: Mapping[Folder, Sequence[str]]

    def folders(self, plate: PlateName) -> tuple[Folder, ...]:
        """Folders that are listed to find the images of a plate; never one that holds other plates too."""
        found = tuple(self.files)
        shared = posixpath.commonprefix([folder.root.split("/") for folder in found])
        in_one_place = len({folder.is_local for folder in found}) == 1
        if len(found) <= MOST_FOLDERS or not in_one_place or not any(part.startswith(plate.plate) for part in shared):
            return found
        return (Folder(found[0].fs, "/".join(shared)),)


class Arrivals:
    """Looks at the bucket again and again.

    Parameters
    ----------
    config
        The configuration; `bucket`, `metadata`, `ingest` and `watch` matter.
    clock
        The time (unix s).
    """

    def __init__(self, config: Config, clock: Callable[[], float] = time.time) -> None:
        self.ingest, self.watch, self.clock = config.ingest, config.watch, clock
        self.bucket, self.metadata = open_place(config.bucket), open_place(config.metadata)
        events = config.watch.events
        self._events = None if events is None else _Events(open_place(config.bucket.model_copy(update={"address": events})))
        self._known: tuple[list[StoredFile], Tables] | None = None
        self._lists: OrderedDict[tuple[str, str], _Images | str] = OrderedDict()
        # What was seen of a plate's files, and since when; before the first look the times of the files alone tell.
        self._seen: dict[PlateName, tuple[int, float]] = {}

    def look(self, skip: Set[PlateName]) -> tuple[list[Arrival], list[Waiting]]:
        """Look which plates are there now.

        Parameters
        ----------
        skip
            Plates that are not of interest any more.

        Returns
        -------
        list of Arrival
            Those that have arrived, the one that changed first first.
        list of Waiting
            Those that are on their way, by name. Plates of other types are in neither.

        Raises
        ------
        OSError
            When storage does not answer, or has no plate table though `ingest.plate_types` asks for one.
        ValueError
            When a metadata table is wrong.
        """
        found, waiting = self._candidates(skip)
        arrived: list[Arrival] = []
        plates = list(found)
        # Some at a time, so that the lists of many plates are never in memory together.
        for first in range(0, len(plates), LISTS_KEPT):
            for one in self._judge({plate: found[plate] for plate in plates[first : first + LISTS_KEPT]}):
                if isinstance(one, Arrival):
                    arrived.append(one)
                else:
                    waiting.append(one)
        self._seen = {plate: seen for plate, seen in self._seen.items() if plate in found}
        return sorted(arrived, key=lambda one: (one.changed, one.plate)), sorted(waiting, key=lambda one: one.plate)

    def _candidates(self, skip: Set[PlateName]) -> tuple[dict[PlateName, StoredFile], list[Waiting]]:
        """Plates of the wanted sources and types that have an image list, with it; and those that wait for a table or a list."""
        lists = self._listed() if self._events is None else self._notified(self._events, skip)
        lists = {plate: lists[plate] for plate in sorted(lists) if plate not in skip and self._is_target(plate.source)}
        plates = self.tables().plates
        types = {PlateName(*row[:3]): row[3] for row in plates[[*METADATA[:3], "Metadata_PlateType"]].itertuples(index=False)}
        found, waiting = {}, []
        for plate, image_list in lists.items():
            if self.ingest.plate_types and plate not in types:
                waiting.append(Waiting(plate, "the plate table does not know it"))
            elif self.ingest.plate_types and types[plate] not in self.ingest.plate_types:
                continue
            elif image_list is None:
                waiting.append(Waiting(plate, _NO_LIST))
            else:
                found[plate] = image_list
        return found, waiting

    def _is_target(self, source: str) -> bool:
        """Whether plates of a source are taken."""
        return source in self.watch.targets if self.watch.targets else source not in labs_of(self.watch.source or "")

    def _listed(self) -> Mapping[PlateName, StoredFile | None]:
        """Image lists of the bucket."""
        dataset = self.ingest.dataset
        sources = self.watch.targets or [name for name in self.bucket.names(dataset) if self._is_target(name)]
        return self._lists_below([f"{dataset}/{source}/workspace/{folder}" for source in sources for folder in LIST_FOLDERS])

    def _lists_below(self, folders: Sequence[str]) -> dict[PlateName, StoredFile | None]:
        """The image list of each plate that has one below these folders."""
        with ThreadPoolExecutor(self.ingest.threads) as pool:
            return _image_lists(self.ingest.dataset, [file for found in pool.map(self.bucket.files, folders) for file in found])

    def _notified(self, events: "_Events", skip: Set[PlateName]) -> Mapping[PlateName, StoredFile | None]:
        """Plates that notifications have named, with their image lists; None where that is not there."""
        events.refresh(self.bucket, self.ingest.dataset)
        named = [plate for plate in events.plates if plate not in skip]
        there = self._lists_below(
            [
                f"{self.ingest.dataset}/{plate.source}/workspace/{folder}/{plate.batch}/{plate.plate}"
                for plate in named
                for folder in LIST_FOLDERS
            ]
        )
        return {plate: there.get(plate) for plate in named}

    def tables(self) -> Tables:
        """Give the metadata, read again when one of its files has changed.

        Raises
        ------
        OSError
            When storage does not answer, or gives no plate, as a share does that is not mounted.
        ValueError
            When a table is wrong: somebody may be writing it.
        """
        files = self.metadata.files()
        if self._known is None or self._known[0] != files:
            self._known = files, read_tables(self.metadata)
        if self._known[1].plates.empty and self.ingest.plate_types:
            asked = f"ingest.plate_types = {self.ingest.plate_types}"
            raise OSError(
                f"{self.metadata.address()}: plate.csv.gz is missing or empty, and {asked} needs it; mount the folder, "
                "correct metadata.address, or give ingest.plate_types=[]"
            )
        return self._known[1]

    def _read_list(self, file: StoredFile) -> _Images | str:
        """What an image list names, or why that is not known yet."""
        key = (file.path, file.tag)
        known = self._lists.pop(key, None)
        if known is None:
            try:
                table = parse_image_list(self.bucket.read(file.path), self.bucket.address(file.path), self.ingest.channels)
                known = _images(table, self.ingest.listed_as, self.bucket) or _NO_IMAGE
            except FileNotFoundError:
                return _NO_LIST
            except OSError as error:  # this one alone: the bucket was listed
                return f"its image list cannot be read: {error}"
            except ValueError as error:
                known = str(error)
        self._lists[key] = known
        while len(self._lists) > LISTS_KEPT:
            self._lists.popitem(last=False)
        return known

    def _judge(self, plates: Mapping[PlateName, StoredFile]) -> Iterator[Arrival | Waiting]:
        """Judge plates by their image lists; those with the same folders together, each of which is listed once."""
        groups: dict[tuple[Folder, ...], list[tuple[PlateName, StoredFile, _Images]]] = defaultdict(list)
        with ThreadPoolExecutor(self.ingest.threads) as pool:
            for plate, images in zip(plates, pool.map(self._read_list, plates.values()), strict=True):
                if isinstance(images, str):
                    yield Waiting(plate, images)
                else:
                    groups[images.folders(plate)].append((plate, plates[plate], images))
            for judged in pool.map(self._judge_group, groups, groups.values()):
                yield from judged

    def _judge_group(
        self, folders: tuple[Folder, ...], plates: Sequence[tuple[PlateName, StoredFile, _Images]]
    ) -> list[Arrival | Waiting]:
        """Judge plates whose images are in the same folders."""
        try:
            there = {folder.path(file.path): file for folder in folders for file in folder.files()}
        except (OSError, ValueError) as error:  # these alone: the bucket was listed
            return [Waiting(plate, f"its images cannot be listed: {error}") for plate, _, _ in plates]
        return [self._judge_plate(plate, file, images, there) for plate, file, images in plates]

    def _judge_plate(
        self, plate: PlateName, image_list: StoredFile, images: _Images, there: Mapping[str, StoredFile]
    ) -> Arrival | Waiting:
        """Whether a plate is complete, or will be no more complete, and at rest."""
        named = [path for paths in images.files.values() for path in paths]
        files = [image_list, *(there[path] for path in named if path in there)]
        missing = len(named) - sum(file.size > 0 for file in files[1:])
        changed = max(file.modified for file in files)
        at_rest = self.clock() - max(changed, self._seen_since(plate, files))
        settle = self.watch.incomplete_after_s if missing else self.watch.settle_s
        if settle is not None and at_rest >= settle:
            return Arrival(plate, changed, images.sites, missing)
        reasons = [f"{missing} of {len(named)} images are not there"] if missing else []
        if settle is not None:
            reasons.append(f"it is taken after {settle:g} s without a change")
        return Waiting(plate, "; ".join(reasons))

    def _seen_since(self, plate: PlateName, files: Sequence[StoredFile]) -> float:
        """Since when this process has seen a plate as it is now; copies may carry the times of their originals."""
        state = hash(frozenset((file.path, file.tag, file.size) for file in files))
        before = self._seen.get(plate)
        if before is None or before[0] != state:
            self._seen[plate] = (state, float("-inf") if before is None else self.clock())
        return self._seen[plate][1]


class _Events:
    """Plates whose image list notifications have named so far.

    Attributes
    ----------
    plates
        Without repetition, in the order in which they were read.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.plates: dict[PlateName, None] = {}
        self._read: set[tuple[str, str]] = set()

    def refresh(self, bucket: Folder, dataset: str) -> None:
        """Read the files that are new; one that is no notification is told in the log."""
        there = self.folder.files()
        # Files expire.
        self._read &= {(file.path, file.tag) for file in there}
        new = [file for file in there if (file.path, file.tag) not in self._read]
        with ThreadPoolExecutor(READS_AT_A_TIME) as pool:
            for first in range(0, len(new), EVENTS_AT_A_TIME):
                some = new[first : first + EVENTS_AT_A_TIME]
                for file, content in zip(some, pool.map(self._content, some), strict=True):
                    self._take(file, content, bucket, dataset)

    def _take(self, file: StoredFile, content: bytes, bucket: Folder, dataset: str) -> None:
        """Note the plates whose image list one file names."""
        self._read.add((file.path, file.tag))
        try:
            found = list(_new_objects(json.loads(content)))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            log.warning("%s: no S3 event notification (%r); it is passed over", self.folder.address(file.path), error)
            return
        keys = [_key_in(bucket, name, key) for name, key in found]
        lists = [one for key in keys if key is not None and (one := _list_of(dataset, key))]
        self.plates |= dict.fromkeys(plate for plate, _ in lists)

    def _content(self, file: StoredFile) -> bytes:
        """One file; one that was deleted meanwhile says nothing."""
        try:
            return self.folder.read(file.path)
        except FileNotFoundError:
            return b'{"Records": []}'


def complete_batch(tables: Tables, source: str, batch: str, plate_types: Sequence[str]) -> list[PlateName]:
    """Plates that a batch will have when it is complete, by the plate table.

    Parameters
    ----------
    tables
        The metadata.
    source, batch
        Which batch.
    plate_types
        Types that count; empty means all.

    Returns
    -------
    list of PlateName
        Sorted; empty where the table does not know the batch.
    """
    plates = tables.plates
    here = plates[(plates["Metadata_Source"] == source) & (plates["Metadata_Batch"] == batch)]
    if plate_types:
        here = here[here["Metadata_PlateType"].isin(plate_types)]
    return sorted(PlateName(*row) for row in here[list(METADATA[:3])].itertuples(index=False))


def _list_of(dataset: str, path: str) -> tuple[PlateName, tuple[int, int]] | None:
    """The plate whose image list a path is, and its rank among the lists of that plate; None where it is something else."""
    match = _LIST.fullmatch(path.removeprefix(f"{dataset}/")) if path.startswith(f"{dataset}/") else None
    if match is None or match[2] not in LIST_FOLDERS or match[5] not in LIST_NAMES:
        return None
    return PlateName(match[1], match[3], match[4]), (LIST_FOLDERS.index(match[2]), LIST_NAMES.index(match[5]))


def _image_lists(dataset: str, files: Sequence[StoredFile]) -> dict[PlateName, StoredFile | None]:
    """The image list of each plate among some files: the one that `find_image_list` takes."""
    best: dict[PlateName, tuple[tuple[int, int], StoredFile]] = {}
    for file in files:
        if (found := _list_of(dataset, file.path)) and (found[0] not in best or found[1] < best[found[0]][0]):
            best[found[0]] = found[1], file
    return {plate: file for plate, (_, file) in best.items()}


def _images(table: pd.DataFrame, listed_as: str, bucket: Folder) -> _Images | None:
    """Files that a parsed image list names, by folder; None where it names none."""
    files: dict[Folder, set[str]] = defaultdict(set)
    folders: dict[str, Folder] = {}
    for name in (column for column in table if str(column).startswith("Orig_")):
        for listed in table[name].dropna().unique():
            address, _, file = map_address(listed, listed_as, bucket).rpartition("/")
            folder = folders.setdefault(address, bucket.at(address))
            files[folder].add(folder.path(file))
    return _Images(len(table), {folder: tuple(found) for folder, found in files.items()}) if files else None


def _new_objects(event: Any) -> Iterator[tuple[str, str]]:
    """Bucket and key of each object that a notification says is new; the wrappers of SNS and EventBridge are taken off."""
    if event.get("Event") == "s3:TestEvent":
        return
    if "Message" in event:
        yield from _new_objects(json.loads(event["Message"]))
    elif "Records" in event.get("detail", event):
        for record in event.get("detail", event)["Records"]:
            if "ObjectCreated" in record["eventName"]:
                yield record["s3"]["bucket"]["name"], unquote_plus(record["s3"]["object"]["key"])
    elif event.get("detail-type", "Object Created") == "Object Created":
        # EventBridge gives keys as they are.
        yield event["detail"]["bucket"]["name"], event["detail"]["object"]["key"]


def _key_in(bucket: Folder, name: str, key: str) -> str | None:
    """Path of an object relative to the bucket's address; None where it is outside."""
    if bucket.is_local:
        return key
    prefix = f"{bucket.root}/"
    return f"{name}/{key}".removeprefix(prefix) if f"{name}/{key}".startswith(prefix) else None
