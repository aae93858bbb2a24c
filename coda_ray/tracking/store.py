"""MLflow runs, found by tag and sent where they differ, so that sending a record again changes nothing.

Every call here may wait for a server. `runs.Tracker` makes them in the background, `sync` in the foreground.
"""

import json
import logging
import math
import os
import re
import shlex
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pandas as pd

from coda_ray.config import Tracking, labs_of
from coda_ray.storage import Folder
from coda_ray.tracking.notes import (
    CONFIG,
    EXPERIMENT_NOTE,
    config_text,
    course_note,
    job_note,
    markdown_matrices,
    plate_name,
    plate_note,
    settings_of,
    transfer_name,
    transfer_note,
    trial_name,
    trial_note,
)
from coda_ray.tracking.outbox import without_password
from coda_ray.tracking.records import IDENTITY, MEASURES, SCORES, course_history, score_name, trial_measures
from coda_ray.tracking.table import mean_scores

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)
PARENT_TAG = "mlflow.parentRunId"
NOTE_TAG = "mlflow.note.content"
TABLES_TAG = "mlflow.loggedArtifacts"
CURVES_TAG = "curves"
# MLflow's page of an experiment asks for traces of language models where it is not told what the experiment holds.
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development", NOTE_TAG: EXPERIMENT_NOTE}
# How MLflow says how a run was made, and what a data set was for.
SOURCE_TAG, SOURCE_TYPE_TAG = "mlflow.source.name", "mlflow.source.type"
COMMIT_TAG, DIRTY_TAG = "mlflow.source.git.commit", "mlflow.source.git.dirty"
CONTEXT_TAG = "mlflow.data.context"
ENDS = {"failed": "FAILED", "running": "KILLED"}
# Folder of a job's report, among the artifacts of its run and in the results.
REPORT = "report"
POINTS_PER_CALL = 1000
# Of the name of a metric.
NAME_LENGTH = 250
# Of a plate of a watcher.
PLATE_PARAMS = (
    "source",
    "batch",
    "plate",
    "model",
    "why",
    "nearest",
    "target",
    "granularity",
    "unit",
    "model_key",
    "stage",
    "version",
)
PLATE_MEASURES = (
    "number", "tiles", "quarantined", "wells", "controls", "drift_source", "drift_nearest", "threshold", "images", "unreadable",
    "confidence", "replicate_agreement", "adaptation_seconds", "tries",
)  # fmt: skip
PLATE_CURVES = ("drift_source", "drift_nearest", "confidence")
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
        """Find or make the parent run of a job, and put description, configuration, data and commit on it.

        Parameters
        ----------
        record
            The job's record, as `pipeline.record.job_record` makes it.

        Returns
        -------
        str
            Run id; the same for the same key.
        """
        run = self._ensure("job", record["key"], record["name"], None, None)
        if NOTE_TAG not in run.data.tags:
            self._upload(run.info.run_id, {CONFIG: config_text(record).encode()})
            self._send_differences(run, settings_of(record), {**_origin(record), NOTE_TAG: job_note(record, None)})
            self._send_data(run, record.get("data", []))
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
        files = {CONFIG: config_text(record).encode()} | {f"{name}.png": data for name, data in pictures.items()}
        tags = {**_origin(record), NOTE_TAG: job_note(record, matrix)}
        values = dict(record.get("scores", {}))
        if matrix is not None and len(matrix):
            files["matrix.json"] = str(matrix.to_json(orient="split", index=False)).encode()
            files["matrix.md"] = markdown_matrices(matrix, matrix["metric"].unique().tolist()).encode()
            tags[TABLES_TAG] = json.dumps([{"path": "matrix.json", "type": "table"}])
            values |= mean_scores(matrix)
        # Of a job that is done again with other workers, say, the first values stay: MLflow changes none.
        fresh = {name: value for name, value in settings_of(record).items() if name not in run.data.params}
        self._send_differences(run, fresh, tags, values)
        self._send_data(run, record.get("data", []))
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

    def transfer(
        self,
        record: Mapping[str, Any],
        history: pd.DataFrame | None,
        parent: str | None,
        job: Mapping[str, Any] | None = None,
    ) -> str:
        """Send one transfer: identity as params, scores as metrics, curves.

        Parameters
        ----------
        record
            The transfer's record. Without scores (before the work) the run is left running.
        history
            Log points (step, time_ms, measures), or None.
        parent
            Run id of the job; the run comes below it, and stays there until a matrix takes it.
        job
            The job's record, for the description and the data.

        Returns
        -------
        str
            Run id; the same for the same key.
        """
        identity = {name: str(record[name]) for name in IDENTITY}
        run = self._ensure("transfer", record["key"], transfer_name(record), parent, _first_ms(history), job)
        # MLflow shows first what came first.
        ordered = (*SCORES, *(name for name in MEASURES if name not in SCORES))
        values = {name: float(record[name]) for name in ordered if record.get(name) is not None}
        tags = {NOTE_TAG: transfer_note(record, job)} if job and run.data.tags.get(PARENT_TAG) == parent else {}
        self._send_differences(run, params=identity, tags=tags, values=values)
        self._send_data(run, _data_of(record, job))
        self._curves(run, history)
        if values and run.info.status != "FINISHED":
            self.end(run.info.run_id, history=history)
        return str(run.info.run_id)

    def stage(
        self, title: str, key: str, history: pd.DataFrame | None, parent: str | None, job: Mapping[str, Any] | None = None
    ) -> str:
        """Send the curves of a stage that several transfers stand on; without them the run is left running.

        Its place is as that of a transfer.

        Returns
        -------
        str
            Run id; the same for the same key.
        """
        run = self._ensure("stage", key, title, parent, _first_ms(history), job)
        self._curves(run, history)
        if history is not None and run.info.status != "FINISHED":
            self.end(run.info.run_id, history=history)
        return str(run.info.run_id)

    def trial(self, record: Mapping[str, Any], parent: str | None, job: Mapping[str, Any] | None = None) -> str:
        """Send one trial of a sweep: values as params, score, criteria and oracles as metrics, the score at its steps as curve.

        A score that reads labels is named `oracle_score`.

        Parameters
        ----------
        record
            The trial's record.
        parent
            Run id of the sweep.
        job
            The sweep's record, for the description and the data.

        Returns
        -------
        str
            Run id.
        """
        values = {name: str(value) for name, value in record["point"].items()}
        score = score_name(record.get("objective", ""))
        history = pd.DataFrame(record.get("curve", []), columns=["step", "time_ms", "score"]).rename(columns={"score": score})
        started = None if history.empty else int(history["time_ms"].max() - 1000 * record["seconds"])
        # A trial of the same values in another sweep is another run.
        run = self._ensure("trial", f"{record['sweep']} {record['key']}", trial_name(record), parent, started)
        tags = {"status": record["status"]} | ({"reason": record["reason"]} if record.get("reason") else {})
        if "reason" in run.data.tags and "reason" not in tags:  # it failed before
            self.client.delete_tag(run.info.run_id, "reason")
        tags |= {NOTE_TAG: trial_note(record, job)} if job else {}
        self._curves(run, history.astype({score: "float64"}))
        self._send_differences(run, params=values, tags=tags, values=trial_measures(record))
        self._send_data(run, job.get("data", []) if job else [])
        self.end(run.info.run_id, ENDS.get(record["status"], "FINISHED"), history)
        return str(run.info.run_id)

    def course(self, record: Mapping[str, Any], parent: str | None, job: Mapping[str, Any] | None = None) -> str:
        """Send one strategy with one seed: what it is as params, means as metrics, accuracy and cost as curves by turn.

        Parameters
        ----------
        record
            The course's record.
        parent
            Run id of the job.
        job
            The job's record, for the description and the data.

        Returns
        -------
        str
            Run id.
        """
        name = f"{record['strategy']}, {record['method']} {record['source']} → {record['target']}, seed {record['seed']}"
        # The same course in another job is another run.
        run = self._ensure("course", f"{record['job']} {record['key']}", name, parent, None)
        params = {name: str(record[name]) for name in ("strategy", "source", "target", "method", "seed")}
        values = {name: float(value) for name, value in record["scores"].items() if value is not None}
        self._curves(run, course_history(record))
        self._send_differences(run, params, {NOTE_TAG: course_note(record, job)} if job else {}, values)
        self._send_data(run, job.get("data", []) if job else [])
        if run.info.status != "FINISHED":
            self.end(run.info.run_id)
        return str(run.info.run_id)

    def plate(self, record: Mapping[str, Any], picture: bytes | None, parent: str | None) -> str:
        """Send one plate of a watcher: what it is and which model it got as params, what was measured as metrics, its picture.

        Parameters
        ----------
        record
            As in `watched/<job key>/<source>/<batch>/<plate>.json`.
        picture
            PNG of the plate's predictions; None where it is gone.
        parent
            Run id of the watcher's job.

        Returns
        -------
        str
            Run id.
        """
        run = self._ensure("plate", record["key"], plate_name(record), parent, None)
        params = {name: str(record[name]) for name in PLATE_PARAMS if record.get(name) is not None}
        values = {name: float(record[name]) for name in PLATE_MEASURES if record.get(name) is not None}
        values |= {_distance_name(unit): float(distance) for unit, distance in record.get("distances", {}).items()}
        self._send_differences(run, params=params, tags={NOTE_TAG: plate_note(record)}, values=values)
        if picture is not None:
            self._upload(run.info.run_id, {"plate.png": picture})
        if run.info.status != "FINISHED":
            self.end(run.info.run_id)
        return str(run.info.run_id)

    def watched(self, job: Mapping[str, Any], table: pd.DataFrame, files: Mapping[str, bytes]) -> None:
        """Put the plates of a watcher on its run: drift and confidence in the order of arrival as curves, table and picture.

        Parameters
        ----------
        job
            The watcher's record.
        table
            One row per plate, in the order of arrival.
        files
            Name to content.
        """
        from mlflow.entities import Metric

        run_id = self.job(job)
        known = {name: {m.step for m in self.client.get_metric_history(run_id, name)} for name in PLATE_CURVES}
        now = time.time_ns() // 1_000_000
        points = [
            Metric(name, float(value), now, number)
            for name in PLATE_CURVES
            for number, value in enumerate(table[name].tolist(), 1)
            if not pd.isna(value) and number not in known[name]
        ]
        for start in range(0, len(points), POINTS_PER_CALL):
            self.client.log_batch(run_id, metrics=points[start : start + POINTS_PER_CALL])
        self._upload(run_id, files)

    def monitor(self, run_id: str) -> "SystemMetricsMonitor | None":
        """Begin to send processor, memory, disk and network of this machine to a run, from a thread of MLflow's own.

        Parameters
        ----------
        run_id
            A run that is running; when it ends, or is not reached, the thread ends.

        Returns
        -------
        SystemMetricsMonitor or None
            Whose `finish` sends the last of it; None where psutil is not installed.
        """
        # What it says of a server that is not reached holds the whole address, with a password.
        logging.getLogger("mlflow.system_metrics").setLevel(logging.CRITICAL + 1)
        try:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
        except ImportError as error:
            log.info("no system metrics: %s", error)
            return None
        monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=self.address)  # type: ignore[no-untyped-call]
        monitor.start()  # type: ignore[no-untyped-call]
        return monitor

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
                return str(client.create_experiment(self.experiment, self.artifacts, EXPERIMENT_TAGS))
            except MlflowException:  # another job may have made it meanwhile
                found = client.get_experiment_by_name(self.experiment)
                if found is None:
                    raise
        if found.lifecycle_stage != "active":
            raise ValueError(
                f"MLflow experiment {self.experiment!r} is deleted: restore it, or choose another tracking.experiment"
            )
        return str(found.experiment_id)

    def _ensure(
        self, kind: str, key: str, name: str, parent: str | None, start: int | None, job: Mapping[str, Any] | None = None
    ) -> "Run":
        """Find the run of a record, or make it, below its parent; `job` is the parent's record where it may have another."""
        client = self.client
        where = f"tags.kind = '{kind}' and tags.key = '{key}'"
        found = client.search_runs([self._experiment_id], where, order_by=["attributes.start_time ASC"])
        if found:
            run, *doubles = sorted(found, key=lambda run: (run.info.start_time, run.info.run_id))
            # An answer that was lost makes a client ask again, and the server make a second run.
            for double in doubles:
                client.delete_run(double.info.run_id)
            if parent and run.data.tags.get(PARENT_TAG) != parent and (job is None or self._takes(job, run)):
                client.set_tag(run.info.run_id, PARENT_TAG, parent)
                run.data.tags[PARENT_TAG] = parent
            return run
        tags = {"kind": kind, "key": key} | ({PARENT_TAG: parent} if parent else {})
        return client.create_run(self._experiment_id, start_time=start, tags=tags, run_name=name)

    def _takes(self, job: Mapping[str, Any], run: "Run") -> bool:
        """Whether a run goes to this job: a matrix would have holes if jobs that share its transfers took them."""
        have = run.data.tags.get(PARENT_TAG)
        # Of a job that a person deleted the search finds no run.
        return not have or job["kind"] == "matrix" or not self.client.search_runs([self._experiment_id], f"run_id = '{have}'")

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
        first = POINTS_PER_CALL - len(new_params) - len(new_tags)
        if new_params or new_tags or new_values:
            self.client.log_batch(run.info.run_id, metrics=new_values[:first], params=new_params, tags=new_tags)
        for start in range(first, len(new_values), POINTS_PER_CALL):
            self.client.log_batch(run.info.run_id, metrics=new_values[start : start + POINTS_PER_CALL])

    def _send_data(self, run: "Run", data: Sequence[Mapping[str, Any]]) -> None:
        """Name the tiles that a run used, as entries of a job's `data`; those that the run names already are left out."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        known = {(have.dataset.name, have.dataset.digest) for have in (run.inputs.dataset_inputs if run.inputs else [])}
        wanted = [
            DatasetInput(
                Dataset(
                    name=one["name"],
                    digest=one["fingerprint"],
                    source_type="s3" if one["address"].startswith("s3:") else "local",
                    source=json.dumps({"uri": without_password(one["address"])}),
                    profile=json.dumps({"num_rows": one["tiles"]}),
                ),
                [InputTag(CONTEXT_TAG, one["context"])],
            )
            for one in data
            if (one["name"], one["fingerprint"]) not in known
        ]
        if wanted:
            self.client.log_inputs(run.info.run_id, wanted)

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


def _origin(record: Mapping[str, Any]) -> dict[str, str]:
    """Say how a job was made, as tags: its kind, and what MLflow shows as the source of a run."""
    script = next((word for word in shlex.split(record["command"]) if word.endswith(".py")), record["command"])
    # jobs/matrix.py, from whatever folder it was started.
    tags = {"job": record["kind"], SOURCE_TAG: "/".join(Path(script).parts[-2:]), SOURCE_TYPE_TAG: "JOB"}
    if record.get("commit"):
        tags |= {COMMIT_TAG: record["commit"], DIRTY_TAG: str(record["dirty"]).lower()}
    return tags


def _data_of(record: Mapping[str, Any], job: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Choose the tiles of a transfer's source and target from those of its job."""
    roles = defaultdict[str, list[str]](list)
    for role in ("source", "target"):
        for lab in labs_of(record[role]):
            roles[lab].append(role)
    data = job.get("data", []) if job else []
    return [{**one, "context": ", ".join(roles[one["name"]])} for one in data if one["name"] in roles]


def _distance_name(unit: str) -> str:
    """Name the metric of a plate's distance from a unit, in the letters that MLflow allows."""
    return f"distance/{re.sub(r'[^A-Za-z0-9_ .-]', '_', unit)}"[:NAME_LENGTH]


def _first_ms(history: pd.DataFrame | None) -> int | None:
    """Time of the first log point."""
    return None if history is None or history.empty else int(history["time_ms"].min())


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
