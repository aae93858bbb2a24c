"""Fill MLflow from the results folder: every job, transfer and stage, each once, however often it is done."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from coda_ray.config import Place
from coda_ray.storage import Folder, open_place, retrying
from coda_ray.tracking.figures import figure_png, matrix_figures
from coda_ray.tracking.records import (
    WATCH,
    WATCH_FIGURE,
    WATCH_TABLE,
    read_history,
    read_record,
    read_records,
    read_watched,
    transfers_frame,
)
from coda_ray.tracking.store import REPORT, RunStore
from coda_ray.tracking.table import job_matrix


@dataclass(frozen=True)
class SyncCounts:
    """How many records MLflow now has.

    Parameters
    ----------
    jobs, transfers, stages, trials, courses, plates
        Numbers of records.
    """

    jobs: int
    transfers: int
    stages: int
    trials: int
    courses: int
    plates: int


def sync(results: Folder, store: RunStore, progress: Callable[[int, int], None] | None = None) -> SyncCounts:
    """Send everything that a results folder holds.

    Parameters
    ----------
    results
        The results folder.
    store
        Where runs go.
    progress
        Called with the number of records sent and their total.

    Returns
    -------
    SyncCounts
        What was sent or was there already.

    Raises
    ------
    ValueError
        When a record is damaged.
    Exception
        What MLflow raises when the server is not reached (see `outbox.is_unreachable`) or refuses a record.
    """
    jobs, transfers = (
        _oldest_first(results, read_records(results, "jobs")),
        read_records(results, "transfers"),
    )
    frame = transfers_frame(transfers)
    job_of, stage_job = _owners(jobs, "transfers"), _owners(jobs, "stages")
    # The curve of a scored adaptation is on its transfers.
    on_transfers = {record["history"] for record in transfers}
    stages = [path for path in sorted(stage_job) if path not in on_transfers]
    trials = [record for sweep in results.names("sweeps") for record in read_records(results, f"sweeps/{sweep}")]
    courses = [record for job in results.names("online") for record in read_records(results, f"online/{job}")]
    plates = read_watched(results)
    done, total = 0, sum(len(kind) for kind in (jobs, transfers, stages, trials, courses, plates))

    def advance() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

    parents = {job["key"]: store.job(job) for job in jobs}
    by_key = {job["key"]: job for job in jobs}
    for record in transfers:
        owner = job_of.get(record["key"], "")
        store.transfer(record, read_history(results, record["history"]), parents.get(owner), by_key.get(owner))
        advance()
    sent = 0
    for path in stages:
        owner = stage_job[path]
        sent += _send_stage(results, store, path, parents[owner], by_key[owner])
        advance()
    for record in trials:
        store.trial(record, parents.get(record["sweep"]), by_key.get(record["sweep"]))
        advance()
    for record in courses:
        store.course(record, parents.get(record["job"]), by_key.get(record["job"]))
        advance()
    for record in plates:
        store.plate(record, _picture(results, record), parents.get(record["job"]))
        advance()
    for job in jobs:
        _finish(store, job, frame)
        _send_report(results, store, job)
        _send_watch(results, store, job)
        advance()
    return SyncCounts(len(jobs), len(transfers), sent, len(trials), len(courses), len(plates))


def _oldest_first(results: Folder, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Order jobs by when their records were written last."""

    def written(job: Mapping[str, Any]) -> Any:
        path = f"jobs/{job['key']}.json"
        return retrying(lambda: results.fs.modified(results.path(path)), results.address(path)), job["key"]

    return sorted(jobs, key=written)


def _owners(jobs: Sequence[Mapping[str, Any]], field: str) -> dict[str, str]:
    """Give what several jobs share to the newest matrix, else to the oldest job, as the jobs themselves did."""
    oldest = {one: job["key"] for job in reversed(jobs) for one in job[field]}
    return oldest | {one: job["key"] for job in jobs if job["kind"] == "matrix" for one in job[field]}


def _send_stage(results: Folder, store: RunStore, path: str, parent: str, job: Mapping[str, Any]) -> bool:
    """Send a stage's curves; False where it is unfinished or has none."""
    history = read_history(results, path)
    if history is None or not results.exists(f"{path}/stage.json"):
        return False
    stage = read_record(results, f"{path}/stage.json")
    store.stage(stage["title"], stage["key"], history, parent, job)
    return True


def _picture(results: Folder, record: Mapping[str, Any]) -> bytes | None:
    """Read the picture of a plate's predictions."""
    try:
        return results.read_address(f"{record['folder']}/plate.png")
    except FileNotFoundError:
        return None


def _send_report(results: Folder, store: RunStore, job: Mapping[str, Any]) -> None:
    """Send the report that was written into the results, where there is one."""
    folder = results.child(f"{REPORT}/{job['key']}")
    if names := folder.names():
        store.report(job, {name: folder.read(name) for name in names})


def _send_watch(results: Folder, store: RunStore, job: Mapping[str, Any]) -> None:
    """Send the table and the picture of all plates of a watcher, where it wrote them."""
    if job["kind"] != "watch":
        return
    out, reached = job["config"]["watch"]["out"], job["config"]["results"]
    folder = open_place(Place.model_validate({**reached, "address": out})) if out else results.child(WATCH)
    try:
        files = {name: folder.read(name) for name in (WATCH_TABLE, WATCH_FIGURE)}
    except FileNotFoundError:  # no plate came yet
        return
    store.watched(job, pd.read_csv(io.BytesIO(files[WATCH_TABLE])), files)


def _finish(store: RunStore, job: Mapping[str, Any], frame: pd.DataFrame) -> None:
    """Put a job's matrix on its run; a job that did not get to its end stays as it is."""
    if not set(job["transfers"]) <= set(frame["key"]) or not job.get("whole", True):
        return
    # A target without labels has no scores, and then there is nothing to tabulate.
    matrix = job_matrix(frame, job) if job["transfers"] else None
    figures = {} if matrix is None else matrix_figures(matrix)
    store.finish_job(job, matrix, {name: figure_png(figure) for name, figure in figures.items()})
