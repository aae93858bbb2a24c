"""At most one process works on something: a lease in storage, held by signs of life.

A term is a file that is created once: `000001.json` names its holder. While it lasts, the holder rewrites `000001.beat.json`;
at its end it leaves `000001.released.json`. Whoever wants the lease takes the next term, once the newest one is released or its
beat stood still for `lease_s` by their own clock: no clocks of two machines are compared. The number of the term is the fencing
token: a holder that was paused for longer finds the next term there (`Lease.check`, and every write to a `GuardedFolder`). One
that is paused between that and its write is kept out by files that are created and never overwritten: an entry of a ledger,
whose number the next holder takes first (`Ledger.claim`), or the `done.json` of a stage.
"""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from uuid import uuid4

from coda_ray.numbered import number_and_kind, numbered
from coda_ray.progress import Say
from coda_ray.storage import Folder

log = logging.getLogger(__name__)
BEATS_PER_LEASE = 4
KEPT_TERMS = 2
# Who waits looks again after this share of the time that it has waited, within bounds.
LOOK_AFTER = 0.1
# Files of a term beside the one that names its holder: what that rewrites, and what ends it.
BEAT, RELEASED = "beat", "released"


class LostLeaseError(RuntimeError):
    """The lease is not, or may no longer be, this process's."""


@dataclass(frozen=True)
class GuardedFolder(Folder):
    """A folder that is written to under a lease: what comes after a newer term was taken is refused.

    It may be pickled, for other processes that work for the holder. Folders inside it (`child`) are not guarded.

    Parameters
    ----------
    terms
        Folder of the lease.
    term
        The term under which it was opened.
    """

    terms: Folder
    term: int

    def __reduce__(self) -> tuple[type["GuardedFolder"], tuple[Any, ...]]:
        """Pickle as a call, as every folder does."""
        return GuardedFolder, (self.fs, self.root, self.terms, self.term)

    def write(self, relative: str, data: bytes) -> None:
        """Write a whole file, as `Folder.write` does.

        Raises
        ------
        LostLeaseError
            When somebody took a newer term.
        """
        self._check()
        super().write(relative, data)

    def create(self, relative: str, data: bytes) -> bool:
        """Write a whole file where none is, as `Folder.create` does; raises as `write`."""
        self._check()
        return super().create(relative, data)

    def delete(self, relative: str) -> None:
        """Delete a file or a folder, as `Folder.delete` does; raises as `write`."""
        self._check()
        super().delete(relative)

    def _check(self) -> None:
        """Make sure that the term is the newest."""
        if _newest(self.terms) != self.term:
            raise LostLeaseError(f"{self.address()}: {_holder(self.terms, self.term + 1)} has taken the lease meanwhile")


class Lease:
    """The right to do something alone; a context that gives it back when it ends.

    Parameters
    ----------
    folder
        Folder of the lease, of its own.
    by
        Name of the holder, for people.
    lease_s
        A holder without a sign of life for so long (s) is taken for dead.
    clock
        Seconds that only rise.
    pause
        Waits for some seconds between looks at another's beat.
    look_s
        Least time between looks (s); those who have waited for long look less often, but each time that a beat is due. None looks
        when a beat is due.

    Attributes
    ----------
    term
        Number of the term that is held; None before `acquire` and after `release`.
    took_over
        Whether the holder before did not give the lease back, and may still wake up.
    """

    def __init__(
        self,
        folder: Folder,
        by: str,
        lease_s: float,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], object] = time.sleep,
        look_s: float | None = None,
    ) -> None:
        self.folder, self.by, self.lease_s, self.clock, self.pause = folder, by, lease_s, clock, pause
        self.beat_s = lease_s / BEATS_PER_LEASE
        self.look_s = self.beat_s if look_s is None else look_s
        self.term: int | None = None
        self.took_over = False
        self._alive = 0.0
        self._beats = 0
        self._ended = threading.Event()

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def acquire(self, wait: bool, say: Say, unless: Callable[[], bool] = lambda: False) -> bool:
        """Take the lease.

        Parameters
        ----------
        wait
            Wait for as long as another holds it, until it is released or its holder is dead. Otherwise only until it is known
            whether the holder lives, which takes `lease_s` at most.
        say
            Told, once per holder that is waited for, who that is.
        unless
            Asked before each look; with True nobody waits any longer.

        Returns
        -------
        bool
            Whether this process holds it now.

        Raises
        ------
        OSError
            When storage does not answer.
        """
        watched: tuple[int, bytes] | None = None
        begun, since = self.clock(), 0.0
        while not unless():
            # Before the look, so that a pause of this process is not taken for a silence of the other.
            now = self.clock()
            names = self.folder.names()
            newest = _newest_of(names)
            released = newest == 0 or numbered(newest, RELEASED) in names
            free = released
            if not free:
                seen = (newest, _read(self.folder, numbered(newest, BEAT)))
                if watched is None or watched[0] != newest:
                    say(_holder(self.folder, newest))
                elif seen != watched and not wait:
                    return False
                if seen != watched:
                    watched, since = seen, self.clock()
                free = now - since >= self.lease_s
            if free and self._take(newest + 1):
                self.took_over = not released
                self._forget(names, newest - KEPT_TERMS)
                return True
            self.pause(min(self.beat_s, max(self.look_s, LOOK_AFTER * (self.clock() - begun))))
        return False

    def guard(self, folder: Folder) -> GuardedFolder:
        """Open a folder to write to for as long as this process holds the lease; acquire it first."""
        return GuardedFolder(folder.fs, folder.root, self.folder, self._held())

    def check(self) -> None:
        """Make sure that this process still holds the lease; called before whatever only its holder may do.

        Raises
        ------
        LostLeaseError
            When somebody else took a newer term, or when this process could give no sign of life for `lease_s`, so that
            somebody may.
        OSError
            When storage does not answer.
        """
        term = self._held()
        # Old terms are deleted.
        if _newest(self.folder) != term:
            other = _holder(self.folder, term + 1)
            raise LostLeaseError(f"{self.folder.address()}: {other} has taken the lease from {self.by}")
        silence = self.clock() - self._alive
        if silence > self.lease_s:
            raise LostLeaseError(
                f"{self.folder.address()}: no sign of life could be written for {silence:.0f} s, and the lease of {self.by} "
                f"ends after {self.lease_s:g} s"
            )

    def beat(self) -> None:
        """Give a sign of life; a thread does so while the lease is held.

        Raises
        ------
        OSError
            When storage does not answer.
        """
        term = self.term
        if term is None:
            return
        # Before the write, so that the holder never counts on more time than others give it.
        began = self.clock()
        self.folder.write(numbered(term, BEAT), json.dumps({"beat": self._beats + 1}).encode())
        self._beats, self._alive = self._beats + 1, began

    def release(self) -> None:
        """Give the lease back; nothing happens where it is not held. What storage refuses, others wait `lease_s` for."""
        if self.term is None:
            return
        term, self.term = self.term, None
        self._ended.set()
        try:
            self.folder.write(numbered(term, RELEASED), json.dumps({"by": self.by}).encode())
        except OSError as error:
            log.warning("the lease could not be released, and ends in %g s: %s", self.lease_s, error)

    def _take(self, term: int) -> bool:
        """Take a term, unless somebody else was faster, and give signs of life from now on."""
        began = self.clock()
        holder = {"by": self.by, "host": socket.gethostname(), "pid": os.getpid(), "nonce": uuid4().hex}
        if not self.folder.create(numbered(term), json.dumps(holder).encode()):
            return False
        self._ended.set()
        self.term, self._alive, self._beats, self._ended = term, began, 0, threading.Event()
        threading.Thread(target=self._live, args=(self._ended,), name=f"lease {term}", daemon=True).start()
        return True

    def _live(self, ended: threading.Event) -> None:
        """Thread: give signs of life until the lease is given back; one that storage refuses is tried again at the next turn."""
        while not ended.wait(self.beat_s):
            try:
                self.beat()
            except OSError as error:
                log.warning("a sign of life could not be written, and is tried again: %s", error)

    def _held(self) -> int:
        """Number of the term that is held."""
        if self.term is None:
            raise LostLeaseError(f"{self.folder.address()}: {self.by} does not hold the lease; acquire it first")
        return self.term

    def _forget(self, names: Iterable[str], last: int) -> None:
        """Delete those files that are of terms until then; whoever held one finds it gone."""
        for name in names:
            if (found := number_and_kind(name)) and found[0] <= last:
                self.folder.delete(name)


def _newest(terms: Folder) -> int:
    """Number of the newest term of a lease, 0 where there is none."""
    return _newest_of(terms.names())


def _newest_of(names: Iterable[str]) -> int:
    """Number of the newest term by the names of a lease's files."""
    found = filter(None, map(number_and_kind, names))
    return max((number for number, kind in found if not kind), default=0)


def _read(terms: Folder, name: str) -> bytes:
    """Content of a file, empty where it is not there."""
    try:
        return terms.read(name)
    except FileNotFoundError:
        return b""


def _holder(terms: Folder, term: int) -> str:
    """The holder of a term, for people."""
    try:
        found = json.loads(_read(terms, numbered(term)))
        return f"{found['by']} (process {found['pid']} on {found['host']})"
    except (ValueError, TypeError, KeyError):
        return f"the holder of term {term}"
