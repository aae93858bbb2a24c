"""Curves while a worker trains: a small object that goes to the worker and never makes it wait."""

import logging
import threading
from collections import deque
from collections.abc import Mapping
from typing import Any

import pandas as pd

from coda_ray.tracking.outbox import Outbox
from coda_ray.tracking.store import POINTS_PER_CALL, curve_points, open_client

EVERY_S = 5.0
POINTS_HELD = 10_000


class LiveLogger:
    """Sends log points to a run that exists, about every five seconds, from a thread of its own.

    It can be pickled; its points stay behind. What cannot be sent is dropped: the curves are whole in the results
    folder and are sent again from there when the stage ends.

    Parameters
    ----------
    address
        Tracking URI, as the worker reaches it.
    run_id
        Run that gets the points.
    """

    def __init__(self, address: str, run_id: str) -> None:
        self.address, self.run_id = address, run_id
        self._start()

    def __getstate__(self) -> dict[str, str]:
        """Travel without threads and points."""
        return {"address": self.address, "run_id": self.run_id}

    def __setstate__(self, state: Mapping[str, str]) -> None:
        """Start anew in another process."""
        self.address, self.run_id = state["address"], state["run_id"]
        self._start()

    def __call__(self, step: int, time_ms: int, metrics: Mapping[str, float]) -> None:
        """Take one log point; return at once.

        Parameters
        ----------
        step
            Optimisation step.
        time_ms
            Unix time in milliseconds, the same that goes into the history.
        metrics
            Name to value; values that are not finite are left out.
        """
        self._points.append({"step": step, "time_ms": time_ms, **metrics})
        if not self._scheduled.is_set():
            self._scheduled.set()
            self._outbox.put("curves", self._send)

    def close(self, wait_s: float = 5.0) -> None:
        """Send the last points, waiting for at most `wait_s`."""
        self._hurry.set()
        self._outbox.close(wait_s)

    def _start(self) -> None:
        """Set up; the thread starts with the first point."""
        self._points: deque[dict[str, Any]] = deque(maxlen=POINTS_HELD)
        self._scheduled, self._hurry = threading.Event(), threading.Event()
        self._outbox = Outbox("live curves", level=logging.DEBUG)
        self._client: Any = None

    def _send(self) -> None:
        """Gather points for a while and send them together."""
        self._client = self._client or open_client(self.address)
        self._hurry.wait(EVERY_S)
        self._scheduled.clear()
        points = [self._points.popleft() for _ in range(len(self._points))]
        if not points:
            return
        metrics = curve_points(pd.DataFrame(points))
        for start in range(0, len(metrics), POINTS_PER_CALL):
            self._client.log_batch(self.run_id, metrics=metrics[start : start + POINTS_PER_CALL])
