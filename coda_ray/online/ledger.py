"""What was done with each plate: an append-only log, one file per entry.

Entries are numbered without gaps, and a number is written by creating its file, which succeeds once. So two writers never both
write one number, and a reader sees an entry whole or not at all. Entry 0 says what the ledger is about.
"""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from coda_ray.config import ConfigError
from coda_ray.jump.layout import PlateName
from coda_ray.numbered import number_and_kind, numbered
from coda_ray.storage import Folder
from coda_ray.tracking.records import READS_AT_A_TIME

BEGUN = "begun"


class LostLedgerError(RuntimeError):
    """Somebody else writes this ledger."""


@dataclass(frozen=True)
class Entry:
    """One line of the log.

    Parameters
    ----------
    number
        Its place, from 0.
    plate
        What it is about; None where it is about no single plate.
    state
        What became of the plate.
    facts
        Whatever else is known, as JSON holds it.
    at
        When it was written (UTC, ISO 8601), by the clock of the writer.
    by
        Who wrote it.
    """

    number: int
    plate: PlateName | None
    state: str
    facts: dict[str, Any]
    at: str
    by: str


class Ledger:
    """An append-only log in a folder of its own; folders inside it are not looked at.

    Attributes
    ----------
    folder
        Where it is.
    by
        Name of this writer in its entries.
    entries
        What is known of it, in order; `refresh` reads what others wrote since.
    """

    def __init__(self, folder: Folder, by: str) -> None:
        self.folder, self.by = folder, by
        self.entries: list[Entry] = []

    @classmethod
    def open(cls, folder: Folder, identity: Mapping[str, Any], by: str) -> "Ledger":
        """Open a ledger, or begin one.

        Parameters
        ----------
        folder
            The folder of the ledger.
        identity
            What all of its entries stand on (JSON); a ledger is continued by the same identity alone.
        by
            Who writes.

        Returns
        -------
        Ledger
            With all entries.

        Raises
        ------
        ConfigError
            When the ledger in this folder has another identity.
        ValueError
            When a file of the folder is damaged or foreign.
        OSError
            When the ledger would begin on a server that lets two writers overwrite each other.
        """
        ledger = cls(folder, by)
        ledger.refresh()
        if not ledger.entries:
            folder.refuses_overwrites(".probe")
            try:
                ledger.append(None, BEGUN, **identity)
            except LostLedgerError:
                ledger.refresh()
        there, here = ledger.entries[0].facts, json.loads(json.dumps(dict(identity)))
        if difference := _difference(there, here):
            field, before, now = difference
            raise ConfigError(
                f"{folder.address()}: this ledger was begun with {field} = {before}, and now it is {now}; "
                "go on with what it was, or begin another ledger by watch.out=another folder"
            )
        return ledger

    def append(self, plate: PlateName | None, state: str, **facts: Any) -> Entry:
        """Write the next entry.

        Parameters
        ----------
        plate
            What it is about; None for no single plate.
        state
            What became of it.
        **facts
            Whatever else is to be known (JSON).

        Returns
        -------
        Entry

        Raises
        ------
        LostLedgerError
            When somebody else has written an entry of this number; nothing was written.
        OSError
            When storage does not answer. Whether it was written is then not known, and a later `append` says that it is lost.
        """
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        entry = Entry(len(self.entries), plate, state, json.loads(json.dumps(facts, allow_nan=False)), at, self.by)
        content = json.dumps(asdict(entry) | {"nonce": uuid4().hex}, indent=1)
        if not self.folder.create(numbered(entry.number), content.encode()):
            other = self._read(entry.number)
            address = self.folder.address(numbered(entry.number))
            raise LostLedgerError(
                f"{address}: {other.by} wrote this entry at {other.at}, before {self.by} could; "
                "one watcher at a time writes a ledger: stop one of them and start the other again"
            )
        self.entries.append(entry)
        return entry

    def claim(self, state: str, **facts: Any) -> Entry:
        """Write an entry about no single plate after whatever others wrote until now, which is read first.

        Who takes the ledger over begins with it: the numbers that the one before counts on are taken from then on.

        Parameters
        ----------
        state
            What the entry says.
        **facts
            Whatever else is to be known (JSON).

        Returns
        -------
        Entry

        Raises
        ------
        ValueError
            When a file is damaged, missing or foreign.
        OSError
            When storage does not answer.
        """
        while True:
            self.refresh()
            try:
                return self.append(None, state, **facts)
            except LostLedgerError:
                continue

    def refresh(self) -> None:
        """Read the entries that others wrote.

        Raises
        ------
        ValueError
            When a file is damaged, missing or foreign.
        """
        newest = max((self._number(name) for name in self._names()), default=-1)
        with ThreadPoolExecutor(READS_AT_A_TIME) as pool:
            self.entries += pool.map(self._read, range(len(self.entries), newest + 1))

    def _names(self) -> list[str]:
        """Names of the files of the folder, without hidden ones, which file managers and NFS leave."""
        return [file.path for file in self.folder.files() if "/" not in file.path and not file.path.startswith(".")]

    def _number(self, name: str) -> int:
        """Number of an entry by the name of its file."""
        found = number_and_kind(name)
        if found is None or found[1]:
            raise ValueError(
                f"{self.folder.address(name)}: belongs to no ledger; move it elsewhere, or give watch.out=another folder"
            )
        return found[0]

    def _read(self, number: int) -> Entry:
        """Read one entry."""
        address = self.folder.address(numbered(number))
        remedy = "restore it from a copy, or begin another ledger by watch.out=another folder"
        try:
            found = json.loads(self.folder.read(numbered(number)))
            plate = None if found["plate"] is None else PlateName(*found["plate"])
            entry = Entry(found["number"], plate, *(found[name] for name in ("state", "facts", "at", "by")))
        except FileNotFoundError:
            raise ValueError(f"{address}: is missing, though later entries of the ledger are there; {remedy}") from None
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{address}: not an entry of a ledger ({type(error).__name__}: {error}); {remedy}") from None
        if entry.number != number:
            raise ValueError(f"{address}: holds the entry of number {entry.number!r}; {remedy}")
        return entry


def _difference(there: Mapping[str, Any], here: Mapping[str, Any], above: str = "") -> tuple[str, str, str] | None:
    """First field, by name, in which two nested mappings differ, and its two values."""
    for name in sorted({*there, *here}):
        before, now = there.get(name), here.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            if difference := _difference(before, now, f"{above}{name}."):
                return difference
        elif (name in there, before) != (name in here, now):
            shown = [json.dumps(side[name]) if name in side else "not given" for side in (there, here)]
            return f"{above}{name}", shown[0], shown[1]
    return None
