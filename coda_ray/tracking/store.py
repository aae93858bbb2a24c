"""MLflow runs, found by tag and sent where they differ, so that sending a record again changes nothing.

Every call here may wait for a server. `runs.Tracker` makes them in the background, `sync` in the foreground.
"""

import json
import logging
import math
import os
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pandas as pd
import yaml

from coda_ray.config import Tracking
from coda_ray.storage import Folder
from coda_ray.tracking.records import IDENTITY, MEASURES, trial_measures
from coda_ray.tracking.table import markdown_matrix, matrices

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)
PARENT_TAG = "mlflow.parentRunId"
NOTE_TAG = "mlflow.note.content"
TABLES_TAG = "mlflow.loggedArtifacts"
CURVES_TAG = "curves"
# Folder of a job's report, among the artifacts of its run and in the results.
REPORT = "report"
NOTE_LENGTH = 7500  # of the 8000 characters that MLflow keeps
POINTS_PER_CALL = 1000
# Set where the user has not: a dead server is known in seconds, not minutes; nothing is printed or phoned home.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def tracking_address(tracking: Tracking, results: Folder) -> str | None:
    """Choose the MLflow server or store.

    Parameters
    ----------
    tracking
        The configuration.
    results
        The results folder.

    Returns
    -------
    str or None
        `MLFLOW_TRACKING_URI`, else an SQLite file in a results folder on this machine; None, with the reason in the
        log, where nothing is to be sent.
    """
    if not tracking.enabled:
        log.info("MLflow is off (tracking.enabled = false)")
        return None
    if address := os.environ.get("MLFLOW_TRACKING_URI"):
        return address
    if results.is_local:
        return f"sqlite:///{results.path('mlflow.db')}"
    log.warning(
        "MLflow is off: results are in %s and MLFLOW_TRACKING_URI is not set; set it, and "
        "`python jobs/sync_mlflow.py --config ...` sends these results later",
        results.address(),
    )
    return None


def open_client(address: str) -> "MlflowClient":
    """Open MLflow's client; the first time imports MLflow, which takes seconds."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    # They report the tables of a new SQLite file, line by line, where a job shows its progress.
    for name in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(address)


@dataclass
class RunStore:
    """The runs of one experiment. Making one makes no request.

    Parameters
    ----------
    address
        Tracking URI.
    experiment
        Name of the experiment; made when absent.
    artifacts
        Address of the artifacts of a new experiment, for stores that have no server to choose it.
    """

    address: str
    experiment: str
    artifacts: str | None = None
    _client: Any = None
    _experiment_id: str = ""
    _opening: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open(cls, tracking: Tracking, results: Folder) -> "RunStore | None":
        """Open the store of a configuration; None where nothing is to be sent."""
        address = tracking_address(tracking, results)
        if address is None:
            return None
        # A database without a server would put artifacts into the current directory.
        beside = results.is_local and not address.startswith(("http:", "https:", "databricks", "uc:"))
        artifacts = Path(results.path("mlflow_artifacts")).as_uri() if beside else None
        return cls(address, tracking.experiment, artifacts)

    @property
    def client(self) -> "MlflowClient":
        """MLflow's client, with the experiment at hand."""
        with self._opening:
            if not self._experiment_id:
                self._client = self._client or open_client(self.address)
                self._experiment_id = self._find_experiment(self._client)
        return cast("MlflowClient", self._client)

    @property
    def experiment_id(self) -> str:
        """Id of the experiment."""
        return self._experiment_id if self.client else ""

    def job(self, record: Mapping[str, Any]) -> str:
        """Find or make the parent run of a job and describe it.

        Parameters
        ----------
        record
            The job's record: key, kind, name, command, config.

        Returns
        -------
        str
            Run id; the same for the same key.
        """
        run = self._ensure("job", record["key"], record["name"], None, None)
        if NOTE_TAG not in run.data.tags:
            self._send_differences(run, tags={"job": record["kind"], NOTE_TAG: _note(record, None)})
        return str(run.info.run_id)

    def finish_job(self, record: Mapping[str, Any], matrix: pd.DataFrame | None, pictures: Mapping[str, bytes]) -> None:
        """Put configuration, matrix and figures on a job's run and end it.

        Parameters
        ----------
        record
            The job's record.
        matrix
            From `table.job_matrix`; None or empty where there is none.
        pictures
            Name to PNG.
        """
        run = self._ensure("job", record["key"], record["name"], None, None)
        files = {"config.yaml": yaml.safe_dump(record["config"], sort_keys=False).encode()}
        files |= {f"{name}.png": data for name, data in pictures.items()}
        tags = {"job": record["kind"], NOTE_TAG: _note(record, matrix)}
        if matrix is not None and len(matrix):
            files["matrix.json"] = str(matrix.to_json(orient="split", index=False)).encode()
            files["matrix.md"] = _markdown(matrix, matrix["metric"].unique().tolist()).encode()
            tags[TABLES_TAG] = json.dumps([{"path": "matrix.json", "type": "table"}])
        self._send_differences(run, tags=tags)
        self._upload(run.info.run_id, files)
        if run.info.status != "FINISHED":
            self.end(run.info.run_id)

    def report(self, record: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        """Put the files of a report on a job's run, below `report/`.

        Parameters
        ----------
        record
            The job's record.
        files
            Name to content.
        """
        self._upload(self.job(record), files, REPORT)

    def transfer(self, record: Mapping[str, Any], history: pd.DataFrame | None, parent: str | None) -> str:
        """Send one transfer: identity as params and tags, scores as metrics, curves.

        Parameters
        ----------
        record
            The transfer's record. Without scores (before the work) the run is left running.
        history
            Log points (step, time_ms, measures), or None.
        parent
            Run id of the job; the run moves under it.

        Returns
        -------
        str
            Run id; the same for the same key.
        """
        identity = {name: str(record[name]) for name in (*IDENTITY, "key")}
        name = "{method} {source} → {target}, {unit} ({scope}), seed {seed}".format(**identity)
        run = self._ensure("transfer", record["key"], name, parent, history)
        values = {name: float(record[name]) for name in MEASURES if record.get(name) is not None}
        self._send_differences(run, params=identity, tags=identity, values=values)
        self._curves(run, history)
        if values and run.info.status != "FINISHED":
            self.end(run.info.run_id, history=history)
        return str(run.info.run_id)

    def stage(self, title: str, key: str, history: pd.DataFrame | None, parent: str | None) -> str:
        """Send the curves of a stage that several transfers stand on; without them the run is left running.

        Returns
        -------
        str
            Run id; the same for the same key.
        """
        run = self._ensure("stage", key, title, parent, history)
        self._curves(run, history)
        if history is not None and run.info.status != "FINISHED":
            self.end(run.info.run_id, history=history)
        return str(run.info.run_id)

    def trial(self, record: Mapping[str, Any], parent: str | None) -> str:
        """Send one trial of a sweep: values as params, score, criteria and oracles as metrics, the score at its steps as curve.

        Parameters
        ----------
        record
            The trial's record.
        parent
            Run id of the sweep.

        Returns
        -------
        str
            Run id.
        """
        values = {name: str(value) for name, value in record["point"].items()}
        history = pd.DataFrame(record.get("curve", []), columns=["step", "time_ms", "score"])
        name = ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in values.items())
        # A trial of the same values in another sweep is another run.
        run = self._ensure("trial", f"{record['sweep']} {record['key']}", name, parent, history)
        tags = {"status": record["status"]} | ({"reason": record["reason"]} if record.get("reason") else {})
        self._curves(run, history.astype({"score": "float64"}))
        self._send_differences(run, params=values, tags=tags, values=trial_measures(record))
        self.end(run.info.run_id, "FAILED" if record["status"] == "failed" else "FINISHED", history)
        return str(run.info.run_id)

    def reopen(self, run_id: str) -> None:
        """Mark a run as running (again)."""
        self.client.update_run(run_id, status="RUNNING")

    def end(self, run_id: str, status: str = "FINISHED", history: pd.DataFrame | None = None) -> None:
        """Close a run, at its last log point where it has one."""
        last = None if history is None or history.empty else int(history["time_ms"].max())
        self.client.set_terminated(run_id, status, last)

    def _find_experiment(self, client: "MlflowClient") -> str:
        """Find or make the experiment."""
        from mlflow.exceptions import MlflowException

        found = client.get_experiment_by_name(self.experiment)
        if found is None:
            try:
                return str(client.create_experiment(self.experiment, artifact_location=self.artifacts))
            except MlflowException:  # another job may have made it meanwhile
                found = client.get_experiment_by_name(self.experiment)
                if found is None:
                    raise
        if found.lifecycle_stage != "active":
            raise ValueError(
                f"MLflow experiment {self.experiment!r} is deleted: restore it, or choose another tracking.experiment"
            )
        return str(found.experiment_id)

    def _ensure(self, kind: str, key: str, name: str, parent: str | None, history: pd.DataFrame | None) -> "Run":
        """Find the run of a record under its newest parent, or make it."""
        client = self.client
        where = f"tags.kind = '{kind}' and tags.key = '{key}'"
        found = client.search_runs([self._experiment_id], where, order_by=["attributes.start_time ASC"])
        if found:
            run, *doubles = sorted(found, key=lambda run: (run.info.start_time, run.info.run_id))
            # An answer that was lost makes a client ask again, and the server make a second run.
            for double in doubles:
                client.delete_run(double.info.run_id)
            if parent and run.data.tags.get(PARENT_TAG) != parent:
                client.set_tag(run.info.run_id, PARENT_TAG, parent)
            return run
        start = None if history is None or history.empty else int(history["time_ms"].min())
        tags = {"kind": kind, "key": key} | ({PARENT_TAG: parent} if parent else {})
        return client.create_run(self._experiment_id, start_time=start, tags=tags, run_name=name)

    def _send_differences(
        self,
        run: "Run",
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        values: Mapping[str, float] | None = None,
    ) -> None:
        """Send what the run does not have yet.

        A value that changed is sent with the time of now, since MLflow shows the newest and, at equal times, the largest.
        """
        from mlflow.entities import Metric, Param, RunTag

        now = time.time_ns() // 1_000_000
        data, finite = run.data, {k: v for k, v in (values or {}).items() if math.isfinite(v)}
        new_params = [Param(k, v) for k, v in (params or {}).items() if data.params.get(k) != v]
        new_tags = [RunTag(k, v) for k, v in (tags or {}).items() if data.tags.get(k) != v]
        new_values = [Metric(k, v, now, 0) for k, v in finite.items() if data.metrics.get(k) != v]
        if new_params or new_tags or new_values:
            self.client.log_batch(run.info.run_id, metrics=new_values, params=new_params, tags=new_tags)

    def _curves(self, run: "Run", history: pd.DataFrame | None) -> None:
        """Send log points, unless the run is marked as having them; MLflow does not double what it has."""
        if history is None or history.empty:
            return
        mark = f"{len(history)} points until {int(history['time_ms'].max())}"
        if run.data.tags.get(CURVES_TAG) == mark:
            return
        points = curve_points(history)
        for start in range(0, len(points), POINTS_PER_CALL):
            self.client.log_batch(run.info.run_id, metrics=points[start : start + POINTS_PER_CALL])
        self.client.set_tag(run.info.run_id, CURVES_TAG, mark)

    def _upload(self, run_id: str, files: Mapping[str, bytes], path: str | None = None) -> None:
        """Put files on a run, below a path, replacing those of the same name."""
        with tempfile.TemporaryDirectory() as folder:
            for name, data in files.items():
                Path(folder, name).write_bytes(data)
            self.client.log_artifacts(run_id, folder, path)


def curve_points(history: pd.DataFrame) -> list[Any]:
    """Turn log points into MLflow metrics; what was not measured, or is not finite, is left out.

    Parameters
    ----------
    history
        Columns step, time_ms and float64 measures.

    Returns
    -------
    list
        `mlflow.entities.Metric`, in the order of rows.
    """
    from mlflow.entities import Metric

    return [
        Metric(str(name), float(value), int(row["time_ms"]), int(row["step"]))
        for row in history.to_dict(orient="records")
        for name, value in row.items()
        if name not in ("step", "time_ms") and value is not None and math.isfinite(value)
    ]


def _markdown(matrix: pd.DataFrame, metrics: list[str]) -> str:
    """Every matrix of some metrics, one below the other."""
    return "\n".join(markdown_matrix(part) for metric in metrics for part in matrices(matrix, metric))


def _note(record: Mapping[str, Any], matrix: pd.DataFrame | None) -> str:
    """Describe a job: its matrix, command and configuration, as long as MLflow keeps it."""
    parts = [] if matrix is None or matrix.empty else [_markdown(matrix, ["accuracy", "macro_f1"])]
    parts.append(f"```\n{record['command']}\n```\n")
    config = f"```yaml\n{yaml.safe_dump(record['config'], sort_keys=False)}```\n"
    note = "\n".join(parts)
    room = NOTE_LENGTH - len(note)
    if room < 0:
        return f"{note[:NOTE_LENGTH]}…\n\nThe whole matrix is in matrix.md, the configuration in config.yaml."
    return f"{note}\n{config}" if len(config) < room else f"{note}\nThe configuration is in config.yaml."
