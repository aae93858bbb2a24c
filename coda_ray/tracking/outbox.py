"""One background thread that sends records in order, so that no caller ever waits for a server."""

import logging
import re
import threading
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as WaitTimeout
from typing import TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")
CAPACITY = 10_000
PATIENCE = 3


class Outbox:
    """A bounded queue and the daemon thread that empties it.

    A call that fails is logged once per kind of failure and counted. After three failures in a row to reach the
    server, nothing more is tried.

    Parameters
    ----------
    name
        What is sent, for messages.
    level
        Logging level of failures.
    capacity
        Records that may wait; more are counted as not sent.
    """

    def __init__(self, name: str, level: int = logging.WARNING, capacity: int = CAPACITY) -> None:
        self._name, self._level, self._capacity = name, level, capacity
        self._waiting: deque[tuple[str, Callable[[], object], int]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._given = self._sent = self._unreachable = 0
        self.failures: Counter[str] = Counter()

    @property
    def unsent(self) -> int:
        """Records that were given and not (yet) sent."""
        return self._given - self._sent

    @property
    def gave_up(self) -> bool:
        """Whether the server could not be reached so often that nothing more is tried."""
        return self._unreachable >= PATIENCE

    def try_again(self) -> None:
        """Forget that the server was given up; what was given meanwhile stays unsent."""
        with self._changed:
            self._unreachable = 0

    def put(self, what: str, send: Callable[[], object]) -> bool:
        """Queue a call; return at once, with whether it will be tried."""
        with self._changed:
            self._given += 1
            if self._closing or self.gave_up or len(self._waiting) >= self._capacity:
                return False
            self._waiting.append((what, send, 1))
            self._changed.notify()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=f"outbox-{self._name}", daemon=True)
                self._thread.start()
        return True

    def ask(self, what: str, send: Callable[[], T], wait_s: float) -> T | None:
        """Queue a call and wait for its answer, at most `wait_s`; None when it fails or comes later."""
        answer: Future[T] = Future()

        def call() -> None:
            try:
                answer.set_result(send())
            except Exception as error:
                answer.set_exception(error)
                raise

        if not self.put(what, call):
            return None
        try:
            return answer.result(timeout=wait_s)
        except WaitTimeout:
            return None
        except Exception:  # the thread has logged and counted it
            return None

    def close(self, wait_s: float, last: Callable[[], object] | None = None) -> int:
        """Send what waits, then make a last call that does not count; at most `wait_s`. Return the number not sent."""
        with self._changed:
            if last is not None and self._thread is not None and not self._closing and not self.gave_up:
                self._waiting.append(("the end", last, 0))
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(wait_s)
        with self._changed:
            self._waiting.clear()
        return self.unsent

    def _work(self) -> None:
        """Send until closed and empty, or until the server is given up."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                what, send, counts = self._waiting.popleft()
            try:
                send()
            except Exception as error:
                self._failed(what, error)
            else:
                self._sent += counts
                self._unreachable = 0
            with self._changed:
                if self.gave_up:
                    log.log(self._level, "%s: not reached %d times in a row; not tried again", self._name, PATIENCE)
                    self._waiting.clear()

    def _failed(self, what: str, error: Exception) -> None:
        """Count a failure; log the first of its kind."""
        lost = is_unreachable(error)
        self._unreachable = self._unreachable + 1 if lost else 0
        kind = "not reached" if lost else type(error).__name__
        if not self.failures[kind]:
            log.log(self._level, "%s: %s was not sent (%s: %s)", self._name, what, kind, one_line(error))
        self.failures[kind] += 1


def is_unreachable(error: BaseException | None) -> bool:
    """Whether a failure lies in the connection or the server's state, not in what was sent."""
    while error is not None:
        # MLflow wraps what requests and SQLAlchemy raise; requests' errors are OSErrors.
        if isinstance(error, OSError) or type(error).__name__ == "OperationalError":
            return True
        if getattr(error, "error_code", None) == "TEMPORARILY_UNAVAILABLE":
            return True
        error = error.__cause__ or error.__context__
    return False


def one_line(error: BaseException) -> str:
    """First line of an error's text, shortened, without passwords."""
    lines = str(error).strip().splitlines() or [""]
    return without_password(lines[0])[:300]


def without_password(text: str) -> str:
    """Take user and password out of the addresses in a text; a password may hold any sign, so what looks like one goes."""
    return re.sub(r"//(?:[^/@\s]*:\S*|[^/@\s]*)@", "//", text)
