"""At most one watcher works on a ledger: a lease in storage, held by signs of life.

A term is a file that is created once: `000001.json` names its holder. While it lasts, the holder rewrites `000001.beat.json`;
at its end it leaves `000001.released.json`. Whoever wants the lease takes the next term, once the newest one is released or its
beat stood still for `lease_s` by their own clock: no clocks of two machines are compared. The number of the term is the fencing
token: a holder that was paused for longer finds the next term there (`check`). One that is paused between that and its entry
finds the entry's number taken, because the next holder begins with an entry of its own (`Ledger.claim`).
"""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from uuid import uuid4

from coda_ray.online.numbered import number_and_kind, numbered
from coda_ray.progress import Say
from coda_ray.storage import Folder

log = logging.getLogger(__name__)
BEATS_PER_LEASE = 4
KEPT_TERMS = 2
# Files of a term beside the one that names its holder: what that rewrites, and what ends it.
BEAT, RELEASED = "beat", "released"


class LostLeaseError(RuntimeError):
    """The lease is not, or may no longer be, this process's."""


class Lease:
    """The right to write a ledger; a context that gives it back when it ends.

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
    ) -> None:
        self.folder, self.by, self.lease_s, self.clock, self.pause = folder, by, lease_s, clock, pause
        self.term: int | None = None
        self.took_over = False
        self._alive = 0.0
        self._beats = 0
        self._ended = threading.Event()

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def acquire(self, wait: bool, say: Say) -> bool:
        """Take the lease.

        Parameters
        ----------
        wait
            Wait for as long as another holds it, until it is released or its holder is dead. Otherwise only until it is known
            whether the holder lives, which takes `lease_s` at most.
        say
            Told once per holder that is waited for.

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
        since = 0.0
        while True:
            # Before the look, so that a pause of this process is not taken for a silence of the other.
            now = self.clock()
            newest = self._newest()
            released = newest == 0 or self.folder.exists(numbered(newest, RELEASED))
            free = released
            if not free:
                seen = (newest, self._read(numbered(newest, BEAT)))
                if watched is None or watched[0] != newest:
                    say(f"{self.folder.address()}: {self._holder(newest)} holds the lease; looking whether it lives")
                elif seen != watched and not wait:
                    return False
                if seen != watched:
                    watched, since = seen, self.clock()
                free = now - since >= self.lease_s
            if free and self._take(newest + 1):
                self.took_over = not released
                self._forget(newest - KEPT_TERMS)
                return True
            self.pause(self.lease_s / BEATS_PER_LEASE)

    def check(self) -> None:
        """Make sure that this process still holds the lease; called before each entry of the ledger.

        Raises
        ------
        LostLeaseError
            When somebody else took a newer term, or when this process could give no sign of life for `lease_s`, so that
            somebody may.
        OSError
            When storage does not answer.
        """
        if self.term is None:
            raise LostLeaseError(f"{self.folder.address()}: {self.by} does not hold the lease; acquire it first")
        # Terms follow each other without gaps; old ones are deleted.
        if self.folder.exists(numbered(self.term + 1)) or not self.folder.exists(numbered(self.term)):
            raise LostLeaseError(
                f"{self.folder.address()}: {self._holder(self.term + 1)} has taken the lease from {self.by}; "
                "this watcher stops; start it again and it waits for the other one"
            )
        silence = self.clock() - self._alive
        if silence > self.lease_s:
            raise LostLeaseError(
                f"{self.folder.address()}: no sign of life could be written for {silence:.0f} s, more than watch.lease_s = "
                f"{self.lease_s:g}; this watcher stops; start it again, with a longer watch.lease_s if storage is that slow"
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
        while not ended.wait(self.lease_s / BEATS_PER_LEASE):
            try:
                self.beat()
            except OSError as error:
                log.warning("a sign of life could not be written, and is tried again: %s", error)

    def _forget(self, last: int) -> None:
        """Delete the files of terms until then; whoever held one finds it gone."""
        old = [name for name in self.folder.names() if (found := number_and_kind(name)) and found[0] <= last]
        for name in old:
            self.folder.delete(name)

    def _newest(self) -> int:
        """Number of the newest term, 0 where there is none."""
        found = filter(None, map(number_and_kind, self.folder.names()))
        return max((number for number, kind in found if not kind), default=0)

    def _read(self, name: str) -> bytes:
        """Content of a file, empty where it is not there."""
        try:
            return self.folder.read(name)
        except FileNotFoundError:
            return b""

    def _holder(self, term: int) -> str:
        """The holder of a term, for people."""
        try:
            found = json.loads(self._read(numbered(term)))
            return f"{found['by']} (process {found['pid']} on {found['host']})"
        except (ValueError, TypeError, KeyError):
            return f"the holder of term {term}"
