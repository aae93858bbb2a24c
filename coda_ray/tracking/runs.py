"""What a job tells MLflow while it works. Results in storage are the truth: `sync` sends later what is lost here."""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from coda_ray.config import Tracking
from coda_ray.storage import Folder
from coda_ray.tracking.figures import figure_png
from coda_ray.tracking.live import LiveLogger
from coda_ray.tracking.outbox import Outbox, without_password
from coda_ray.tracking.records import IDENTITY
from coda_ray.tracking.store import RunStore

log = logging.getLogger(__name__)
# What a whole job may wait (s): for the runs of its live curves, and at its end for what was not sent yet. A server may be
# down for good; a database in the results folder is at most slow.
SERVER_WAIT_S = (20.0, 30.0)
FILE_WAIT_S = (120.0, 600.0)


class Tracker:
    """A job's view of MLflow: what it sends goes through a thread, so a slow or dead server costs the job nothing.

    Parameters
    ----------
    store
        Where runs go; None sends nothing.
    system_metrics
        Whether the job's run shows this machine's load.
    """

    def __init__(self, store: RunStore | None, *, system_metrics: bool = False) -> None:
        self._store = store
        self._watching = system_metrics
        self._monitor: Any = None
        self._outbox = Outbox("MLflow")
        self._job: Mapping[str, Any] | None = None
        self._parent: str | None = None
        self._running: set[str] = set()
        in_file = store is not None and store.address.startswith("sqlite:")
        self._live_wait_s, self._end_wait_s = FILE_WAIT_S if in_file else SERVER_WAIT_S

    @classmethod
    def open(cls, tracking: Tracking, results: Folder) -> "Tracker":
        """Open the tracker of a job; makes no request.

        Parameters
        ----------
        tracking
            The configuration.
        results
            The results folder.

        Returns
        -------
        Tracker
            To `MLFLOW_TRACKING_URI`, else to `mlflow.db` in a results folder on this machine; else one that sends
            nothing, with the reason in the log.
        """
        return cls(RunStore.open(tracking, results), system_metrics=tracking.system_metrics)

    @property
    def ui_hint(self) -> str | None:
        """How to look at the runs: a command, or the server's address; None when nothing is sent."""
        if self._store is None:
            return None
        address = without_password(self._store.address)
        return address if address.startswith("http") else f"mlflow ui --backend-store-uri {address}"

    def start_job(self, record: Mapping[str, Any]) -> None:
        """Begin a job; the same key again continues its run.

        Parameters
        ----------
        record
            As in `jobs/<job key>.json`.
        """
        self._job = dict(record)
        self._put(f"job {record['name']}", self._ensure_parent)

    def transfer(self, record: Mapping[str, Any], history: pd.DataFrame | None = None) -> None:
        """Send a scored transfer.

        Parameters
        ----------
        record
            As in `transfers/<key>.json`.
        history
            Log points of its adaptation, or None.
        """
        scored = dict(record)

        def send(store: RunStore) -> None:
            self._running.discard(store.transfer(scored, history, self._ensure_parent(store), self._job))

        self._put(f"transfer {record['key']}", send)

    def trial(self, record: Mapping[str, Any]) -> None:
        """Send a trial of a sweep, as in `sweeps/<sweep key>/<trial key>.json`."""
        self._put(f"trial {record['key']}", lambda store: store.trial(record, self._ensure_parent(store), self._job))

    def plate(self, record: Mapping[str, Any], picture: bytes) -> None:
        """Send a plate of a watcher, as `records.watched_path` names its record, with the picture of its predictions."""
        self._put(f"plate {record['key']}", lambda store: store.plate(record, picture, self._ensure_parent(store)))

    def watched(self, table: pd.DataFrame, files: Mapping[str, bytes]) -> None:
        """Send the table of all plates of a watcher, and the files that show it."""
        job = dict(self._job or {})
        self._put(f"plates of {job['name']}", lambda store: store.watched(job, table, files))

    def course(self, record: Mapping[str, Any]) -> None:
        """Send a course of an online evaluation, as in `online/<job key>/<course key>.json`."""
        self._put(f"course {record['key']}", lambda store: store.course(record, self._ensure_parent(store), self._job))

    def stage(self, title: str, key: str, history: pd.DataFrame | None) -> None:
        """Send the curves of a stage that several transfers stand on."""

        def send(store: RunStore) -> None:
            run_id = store.stage(title, key, history, self._ensure_parent(store), self._job)
            if history is not None:
                self._running.discard(run_id)

        self._put(f"stage {title}", send)

    def live(self, record: Mapping[str, Any]) -> LiveLogger | None:
        """Make a transfer's run before its training, and the logger that goes to the worker.

        Parameters
        ----------
        record
            The transfer's identity and key; scores are not needed.

        Returns
        -------
        LiveLogger or None
            None when MLflow does not answer in time: all these calls of a job together wait for at most 20 s.
        """
        identity = {name: record[name] for name in (*IDENTITY, "key")}
        return self._live(
            f"transfer {record['key']}",
            lambda store: store.transfer(identity, None, self._ensure_parent(store), self._job),
        )

    def live_stage(self, title: str, key: str) -> LiveLogger | None:
        """Make a stage's run before its training; otherwise as `live`."""
        return self._live(f"stage {title}", lambda store: store.stage(title, key, None, self._ensure_parent(store), self._job))

    def finish_job(
        self,
        record: Mapping[str, Any],
        matrix: pd.DataFrame | None = None,
        figures: Mapping[str, Figure] | None = None,
    ) -> None:
        """End a job.

        Parameters
        ----------
        record
            The job's record, as at the start.
        matrix
            From `table.job_matrix`.
        figures
            Name to figure, from `figures.matrix_figures`; rendered before this returns.
        """
        if self._store is None:
            return
        pictures = {name: figure_png(figure) for name, figure in (figures or {}).items()}

        def send(store: RunStore) -> None:
            store.finish_job(record, matrix, pictures)
            self._running.discard(self._parent or "")

        self._put(f"job {record['name']}", send)

    def report(self, record: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        """Send the files of a job's report.

        Parameters
        ----------
        record
            The job's record.
        files
            Name to content.
        """
        self._put(f"report of {record['name']}", lambda store: store.report(record, files))

    def try_again(self) -> None:
        """Try a server again that was given up: jobs that never end outlive its outages, and `sync` sends what is missing."""
        self._outbox.try_again()

    def close(self, wait_s: float | None = None) -> int:
        """Send what waits, for at most `wait_s` (None: as long as is sensible for the place); say what was not sent.

        Runs that were begun and not ended (the job failed) end as FAILED.

        Returns
        -------
        int
            Records that were not sent.
        """
        if self._store is None:
            return 0
        store = self._store
        unsent = self._outbox.close(self._end_wait_s if wait_s is None else wait_s, lambda: self._end(store))
        if unsent:
            log.warning(
                "MLflow at %s: %d records were not sent; the results are complete, and "
                "`python jobs/sync_mlflow.py --config ...` sends them later",
                without_password(self._store.address),
                unsent,
            )
        return unsent

    def _put(self, what: str, send: Callable[[RunStore], object]) -> None:
        """Queue a call."""
        if (store := self._store) is not None:
            self._outbox.put(what, lambda: send(store))

    def _live(self, what: str, make: Callable[[RunStore], str]) -> LiveLogger | None:
        """Make a run within what is left of the job's patience."""
        store = self._store
        if store is None or self._live_wait_s <= 0:
            return None

        def begin() -> str:
            run_id = make(store)
            store.reopen(run_id)
            self._running.add(run_id)
            return run_id

        started = time.monotonic()
        run_id = self._outbox.ask(what, begin, self._live_wait_s)
        self._live_wait_s -= time.monotonic() - started
        return LiveLogger(store.address, run_id) if run_id else None

    def _ensure_parent(self, store: RunStore) -> str | None:
        """Run id of the job; made by whichever call first reaches the server."""
        if self._parent is None and self._job is not None:
            self._parent = store.job(self._job)
            store.reopen(self._parent)
            self._running.add(self._parent)
            if self._watching:
                self._monitor = store.monitor(self._parent)
        return self._parent

    def _end(self, store: RunStore) -> None:
        """End what the job left running."""
        if self._monitor is not None:
            self._monitor.finish()
        while self._running:
            store.end(self._running.pop(), "FAILED")
