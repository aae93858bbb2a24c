"""How the stages that run tell the driver how far they are: a small actor that they never wait for."""

import time
from contextlib import suppress
from typing import Any

import ray

SECONDS_BETWEEN_TELLS = 0.5
# Calls that a process may have on their way to a tally that does not answer; more are dropped.
MOST_PENDING = 100


class _Counts:
    """What was told since the driver asked last: the key of a stage to how much is done, and of how much."""

    def __init__(self) -> None:
        self.told: dict[str, tuple[int, int]] = {}

    def tell(self, key: str, done: int, total: int) -> None:
        """Note how far a stage is."""
        self.told[key] = (done, total)

    def take(self) -> dict[str, tuple[int, int]]:
        """Give what is new."""
        told, self.told = self.told, {}
        return told


class Teller:
    """Tells how far one stage is, from whichever process runs it, at most twice a second; returns at once and never fails.

    Parameters
    ----------
    counts
        Handle of the actor.
    key
        Key of the stage.
    """

    def __init__(self, counts: Any, key: str) -> None:
        self._counts, self._key = counts, key
        self._total, self._next = -1, 0.0

    def __reduce__(self) -> tuple[type["Teller"], tuple[Any, str]]:
        """Travel without the clock, which is another one elsewhere."""
        return Teller, (self._counts, self._key)

    def __call__(self, done: int, total: int) -> None:
        """Say that `done` of `total` are done; the first and the last of a total are never left out."""
        now = time.monotonic()
        if total == self._total and done < total and now < self._next:
            return
        self._total, self._next = total, now + SECONDS_BETWEEN_TELLS
        # The answer is not waited for. A display that is not there, or too slow, is no reason for a stage to fail.
        with suppress(Exception):
            self._counts.tell.remote(self._key, done, total)


class Tally:
    """The driver's end; it asks without waiting, and what died has nothing new."""

    def __init__(self) -> None:
        # It restarts on another node when its own dies; what was told before is told again soon.
        options: dict[str, Any] = {"num_cpus": 0, "max_restarts": -1, "max_pending_calls": MOST_PENDING}
        self.actor: Any = ray.remote(_Counts).options(**options).remote()
        self._asked: Any = None

    def teller(self, key: str) -> Teller:
        """Make what the process of a stage tells with."""
        return Teller(self.actor, key)

    def news(self) -> dict[str, tuple[int, int]]:
        """Give what was told since the time before last; the answer to one call is read by the next."""
        told: dict[str, tuple[int, int]] = {}
        # As for those who tell: without a tally the stages run on, unshown.
        with suppress(Exception):
            if self._asked is not None:
                if not ray.wait([self._asked], timeout=0)[0]:
                    return told
                answer, self._asked = self._asked, None
                told = ray.get(answer)
        with suppress(Exception):
            self._asked = self.actor.take.remote()
        return told
