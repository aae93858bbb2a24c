"""The sweep: Ray Tune over the hyperparameters of an adaptation; what no trial changes is made once, before."""

import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from coda_ray.analysis.selection import ACROSS_BATCHES, CRITERIA
from coda_ray.cluster import quieten
from coda_ray.config import Config, ConfigError, dump_config
from coda_ray.methods import row_of
from coda_ray.pipeline.matrix import raise_failures, run_stages
from coda_ray.pipeline.record import job_record, write_job
from coda_ray.pipeline.searcher import OptunaSearcher
from coda_ray.pipeline.space import OWN, POINT, Point, config_at, corners, known_points, lengths, own_points, points_of
from coda_ray.pipeline.stage import Stage, with_needs
from coda_ray.pipeline.task import check_resources, room
from coda_ray.pipeline.trial import ENDED, ORACLE, ORACLES, Cell, Trial, summary
from coda_ray.progress import Say
from coda_ray.storage import Folder, open_place
from coda_ray.tiles.store import content_key
from coda_ray.tracking.notes import CONFIG, adapt_block, trial_options
from coda_ray.tracking.records import read_record, read_records, score_name, trial_measures
from coda_ray.tracking.runs import Tracker
from coda_ray.tracking.store import REPORT
from coda_ray.tracking.table import markdown_table

# A trial waits for its stages, which may want every CPU of a node; Tune refuses to reserve nothing, so it is one byte.
TRIAL = {"memory": 1.0}
BEST, TABLE, SCORES = "best.yaml", "trials.csv", "scores.csv"
MOST_TOLD = 10


@dataclass(frozen=True)
class Outcome:
    """What a sweep brought.

    Parameters
    ----------
    table
        One row per trial, the best first; then unfinished and failed ones; the unadapted models are among them, as trials
        without values.
    files
        Address of the table, of every score of every pair, seed and step and, once a trial finished, of the best
        configuration.
    best
        Options of jobs/adapt.py, beside the sweep's own, that adapt with the best values, a line for each pair and seed; none
        before a trial finished.
    whole
        Whether every trial ended: finished, stopped early or failed.
    ui_hint
        How to look at the runs in MLflow.
    """

    table: pd.DataFrame
    files: list[str]
    best: list[str]
    whole: bool
    ui_hint: str | None


def run_sweep(config: Config, command: str, say: Say) -> Outcome:
    """Run what is missing of a sweep; the same configuration again continues it.

    Parameters
    ----------
    config
        Settings; section `tune` says what is searched.
    command
        The command line, for MLflow.
    say
        Receives lines of progress.

    Returns
    -------
    Outcome
        The ranked table, also after an interruption by Ctrl-C.

    Raises
    ------
    ConfigError
        Before anything runs, when the space does not fit; before the trials, when the data cannot answer the objective.
    DataError
        Before anything runs, when tiles, labels or partners are not there.
    StagesFailedError
        When a stage that every trial stands on failed.
    """
    results = open_place(config.results)
    bases = _bases(config)
    key = _key(config, bases)
    # Several methods and every granularity start from one unadapted model.
    cells = list({cell.before.key: cell for cell in reversed(bases)}.values())[::-1]
    upstream = with_needs(cell.before for cell in cells)
    job = _job(config, key, command, upstream)
    write_job(results, job)
    tracker = Tracker.open(config.tracking, results)
    try:
        tracker.start_job(job)
        _make_upstream(config, results, upstream, tracker, say)
        _check_objective(config, cells)
        whole = False
        try:
            whole = _search(config, results, key, tracker, say)
        finally:  # whatever ended the search, what is finished stands in the table
            outcome = _conclude(config, results, job, cells, tracker, whole=whole)
        return outcome
    finally:
        tracker.close()


def _bases(config: Config) -> list[Cell]:
    """Plan what no trial changes: the cells of each method and granularity at the configuration's own values.

    Raises
    ------
    ConfigError
        When there is nothing to search, a name or a value is none, or no trial is long enough to be stopped early.
    """
    settings = config.tune
    if not settings.pairs or not settings.space:
        raise ConfigError(f"tune.{'space' if settings.pairs else 'pairs'} is empty; say what is to be searched, see --help")
    known = {*CRITERIA, *ORACLES}
    if settings.objective not in known:
        raise ConfigError(f"tune.objective = {settings.objective!r}: choose from {', '.join(sorted(known))}")
    for point in [*corners(settings), *known_points(settings)]:
        Trial.at(config, "", point)
    if settings.stop_early and settings.score_every >= (longest := _longest(config)):
        raise ConfigError(
            f"tune.score_every = {settings.score_every}: the longest adaptation has {longest} steps, so none could end early; "
            "lower it, or set tune.stop_early to false"
        )
    cells = [cell for own in own_points(settings) for cell in Trial.at(config, "", own).cells]
    _check_seen(config, cells)
    return cells


def _check_seen(config: Config, cells: Sequence[Cell]) -> None:
    """Refuse an objective that the adapted tiles or a method cannot answer, and trials that no common tiles are scored on.

    Raises
    ------
    ConfigError
        When there are such.
    """
    objective, unit = config.tune.objective, f"adapt.unit = {config.adapt.unit!r}"
    scored: dict[tuple[str, str, int], str] = {}
    for cell in cells:
        request, (batch, *more) = cell.request, cell.seen.units("batch")
        if objective in ACROSS_BATCHES and not more:
            raise ConfigError(
                f"tune.objective = {objective!r} compares batches, and all tiles of {request.target} that are adapted to are of "
                f"{batch} ({unit}, granularity {request.granularity}); choose another objective, or set adapt.unit to all"
            )
        if objective == "held_out_loss" and not row_of(request.method).loss:
            raise ConfigError(
                f"tune.objective = {objective!r}: {request.method} has no self-supervised loss; choose another, or leave it out"
            )
        seen = cell.seen.fingerprint
        if scored.setdefault((request.source, request.target, request.seed), seen) != seen:
            raise ConfigError(
                f"{unit}: trials of different granularity would be scored on different tiles of {request.target}; "
                "set it to all, or search one granularity"
            )


def _key(config: Config, cells: Sequence[Cell]) -> str:
    """Name a sweep by what is searched, what it stands on and the labels of its oracles; more samples or room are the same."""
    settings = config.tune.model_dump(mode="json", exclude={"samples", "at_once"})
    plain = [stage.key for cell in cells for stage in cell.after(None)]
    labels = [cell.labelled.fingerprint for cell in cells]
    return content_key({"kind": "tune", "tune": settings, "cells": plain, "labels": labels})


def _job(config: Config, key: str, command: str, upstream: Sequence[Stage]) -> dict[str, Any]:
    """Describe the sweep for MLflow."""
    settings = config.tune
    ends = ", ".join(f"{source} → {target}" for source, target in settings.pairs)
    record = job_record(
        config,
        key=key,
        kind="tune",
        name=f"sweep of {', '.join(settings.space)}, {ends}",
        command=command,
        pairs=settings.pairs,
        transfers=[],
        stages=upstream,
    )
    return {**record, "whole": False}


def _make_upstream(config: Config, results: Folder, upstream: Sequence[Stage], tracker: Tracker, say: Say) -> None:
    """Run once what every trial looks up."""
    missing = [stage for stage in upstream if stage.facts(results) is None]
    if not missing:
        return
    say("before the trials:")
    raise_failures(run_stages(config, upstream, say, tracker))


def _check_objective(config: Config, cells: Sequence[Cell]) -> None:
    """Refuse an objective that the data cannot answer; the unadapted models show it before a trial is run.

    Raises
    ------
    ConfigError
        When there is no such number.
    """
    objective = config.tune.objective
    for cell in cells:
        if cell.measure_unadapted()[objective] is None:
            raise ConfigError(f"tune.objective: {cell.reason(objective, unadapted=True)}; choose another")


def _search(config: Config, results: Folder, key: str, tracker: Tracker, say: Say) -> bool:
    """Let Tune run the trials that are missing; False after Ctrl-C, which Tune takes as a wish to stop."""
    settings = config.tune
    records = _records(results, key)
    ended = {record["key"] for record in records if record["status"] in ENDED}
    searcher, grid = None, {}
    if settings.search == "optuna":
        searcher = OptunaSearcher(config, key, records, _mode(settings.objective))
        planned = min(settings.samples, len(searcher.listed) or settings.samples)
        number = max(0, planned - len(ended))
    else:
        trials: dict[str, Point] = {}
        for point in points_of(settings):
            trial = Trial.at(config, key, point)
            first = trials.setdefault(trial.key, point)
            if first != point:
                say(f"{_values(point)}: the same trial as {_values(first)}")
        planned, missing = len(trials), [point for name, point in trials.items() if name not in ended]
        number, grid = len(missing), {POINT: tune.grid_search(missing)}
    say(f"{planned} trials, {planned - number} of them finished before")
    if not number:
        return True
    check_resources(config.train, say)
    progress = _Progress(config, key, tracker, planned, planned - number, say)
    with tempfile.TemporaryDirectory(prefix="coda_ray_tune_") as scratch:
        # Tune's own state is pickled, and so never read again: a sweep continues from the records of its trials.
        for name, value in {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"}.items():
            os.environ.setdefault(name, value)
        # Failed trials are told in a line each.
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
        tuner = tune.Tuner(
            tune.with_resources(partial(_run_trial, base=config, sweep=key), TRIAL),
            param_space=grid,
            tune_config=tune.TuneConfig(
                metric="score",
                mode=_mode(settings.objective),
                scheduler=_scheduler(config),
                search_alg=searcher,
                num_samples=number if searcher else 1,
                max_concurrent_trials=_at_once(config),
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=key,
                storage_path=scratch,
                callbacks=[progress],
                verbose=0,
                # In a notebook Tune would leave an empty table of its own.
                progress_reporter=tune.CLIReporter(),
                failure_config=tune.FailureConfig(max_failures=0),
            ),
        )
        tuner.fit()
    return progress.done >= (len(searcher.trials) if searcher and searcher.exhausted else planned)


def _run_trial(tuned: Mapping[str, Any], base: Config, sweep: str) -> None:
    """Run one trial in a process of Tune's."""
    quieten()
    trial = Trial.at(base, sweep, tuned[POINT])
    try:
        trial.run(lambda record: tune.report({"score": record["score"], "step": record["step"]}))
    except Exception as error:
        trial.fail(f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")
        raise


def _mode(objective: str) -> str:
    """Which way is better."""
    return "max" if objective in ORACLES or CRITERIA[objective] == "higher" else "min"


def _scheduler(config: Config) -> ASHAScheduler | None:
    """End bad trials early, where that is wanted."""
    settings = config.tune
    if not settings.stop_early:
        return None
    return ASHAScheduler(
        time_attr="step", max_t=_longest(config), grace_period=settings.score_every, reduction_factor=settings.reduction
    )


def _longest(config: Config) -> int:
    """Steps of the longest adaptation that a trial may have."""
    return max(Trial.at(config, "", point).steps for point in lengths(config.tune))


def _at_once(config: Config) -> int:
    """Most trials side by side: as many as have room for a stage each, for early stopping needs trials that move."""
    return config.tune.at_once or room(config.train)


class _Progress(tune.Callback):
    """Tells what becomes of trials, and keeps the records of those that did not come to their end."""

    def __init__(self, base: Config, key: str, tracker: Tracker, planned: int, done: int, say: Say) -> None:
        self.base, self.key, self.tracker, self.planned, self.done, self.say = base, key, tracker, planned, done, say
        self.results = open_place(base.results)

    def __reduce__(self) -> tuple[Any, ...]:
        """Tune pickles its callbacks with its state, which is never read again."""
        return tune.Callback, ()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Send a trial that finished or was stopped early."""
        tried = Trial.at(self.base, self.key, trial.config[POINT])
        record = self._read(tried) or {}
        if record["status"] == "running":
            record["status"] = "stopped"
            self.results.write(tried.path, json.dumps(record, indent=1).encode())
            for cell in tried.cells:
                cell.drop_checkpoints(self.results)
        name = score_name(record["objective"])
        self._told(record, f"{record['status']} at step {record['step']}, {name} {_text(record['score'])}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tell why a trial raised; one whose process died could not say it."""
        tried = Trial.at(self.base, self.key, trial.config[POINT])
        record = self._read(tried)
        if record is None or record["status"] != "failed":
            record = tried.fail("its process died; Ray's log says why (out of memory?)")
        self._told(record, f"failed: {record['reason']}")

    def _read(self, trial: Trial) -> dict[str, Any] | None:
        """Read what the trial's process wrote."""
        return read_record(self.results, trial.path) if self.results.exists(trial.path) else None

    def _told(self, record: Mapping[str, Any], what: str) -> None:
        self.done += 1
        self.say(f"[{self.done}/{self.planned}] {_values(record[POINT])}: {what}")
        self.tracker.trial(record)


def _values(point: Mapping[str, Any]) -> str:
    """Show the values of a trial."""
    return ", ".join(f"{name} {_text(value)}" for name, value in point.items())


def _text(value: Any) -> str:
    """Show a value or a score."""
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)


def _records(results: Folder, key: str) -> list[dict[str, Any]]:
    """Read what is known of a sweep's trials."""
    return read_records(results, f"sweeps/{key}")


def _conclude(
    config: Config, results: Folder, job: dict[str, Any], cells: Sequence[Cell], tracker: Tracker, *, whole: bool
) -> Outcome:
    """Rank the trials, and write the table and the best configuration."""
    records = _records(results, job["key"])
    table = _table(config, records, cells)
    files = {
        name: frame.to_csv(index=False).encode() for name, frame in ((TABLE, table), (SCORES, _scores(config, records, cells)))
    }
    options, best_score, score = [], {}, score_name(config.tune.objective)
    finished = table[(table["status"] == "finished") & table[score].notna()]
    folder = results.child(f"{REPORT}/{job['key']}")
    if len(finished):
        (best,) = [record for record in records if record["key"] == finished["key"].iloc[0]]
        best_score = {f"best_{score}": best["score"]}
        files[BEST] = dump_config(config_at(config, best[POINT])).encode()
        options = trial_options(best[POINT], config.tune.model_dump(mode="json"))
    for name, content in files.items():
        folder.write(name, content)
    if whole:
        job |= {"whole": True, "summary": _summary(config, table, options), "scores": best_score}
        write_job(results, job)
        tracker.finish_job(job)
    tracker.report(job, files)
    return Outcome(table, [folder.address(name) for name in files], options, whole, tracker.ui_hint)


def _table(config: Config, records: Sequence[Mapping[str, Any]], cells: Sequence[Cell]) -> pd.DataFrame:
    """Rank trials by their score; what did not finish comes after, and the unadapted models stand among them."""
    names, objective, score = list(config.tune.space), config.tune.objective, score_name(config.tune.objective)
    rows = [
        {
            **{name: record[POINT].get(name) for name in names},
            "status": "interrupted" if record["status"] == "running" else record["status"],
            "step": record.get("step"),
            score: record["score"],
            "n_seeds": len({cell["seed"] for cell in record.get("cells", [])}),
            **trial_measures(record),
            "reason": record.get("reason"),
            "key": record["key"],
        }
        for record in records
    ]
    rows += [_unadapted(config, method, own) for method, own in _by_method(cells).items()]
    shown = ["status", "step", score, f"{score}_std", "n_seeds", *CRITERIA, *ORACLES, "reason", "key"]
    frame = pd.DataFrame(rows, columns=[*names, *shown])
    # As they were given: beside an unadapted model, which has none, pandas takes whole numbers for floats.
    frame[names] = pd.DataFrame([[row.get(name) for name in names] for row in rows], columns=names, dtype=object)
    frame["n_trials"] = len(records)
    worst = frame["status"].map({"finished": 0, "unadapted": 0}).fillna(1)
    ordered = frame.assign(worst=worst, sign=frame[score].astype(float) * (-1 if _mode(objective) == "max" else 1))
    return ordered.sort_values(["worst", "sign"], na_position="last").drop(columns=["worst", "sign"]).reset_index(drop=True)


def _scores(config: Config, records: Sequence[Mapping[str, Any]], cells: Sequence[Cell]) -> pd.DataFrame:
    """Lay out every score: one row per trial, step, pair and seed, and per unadapted model at step 0."""
    own = {name: getattr(config.tune, name) for name in OWN}
    rows = [
        {"trial": record["key"], "step": point["step"], **own, **record[POINT], **cell}
        for record in records
        for point in record.get("curve", [])
        for cell in point.get("cells", [])
    ]
    rows += [
        {"trial": f"unadapted {cell.request.method}", "step": 0, "method": cell.request.method, **cell.measure_unadapted()}
        for cell in cells
    ]
    return pd.DataFrame(rows)


def _summary(config: Config, table: pd.DataFrame, best: Sequence[str]) -> str:
    """Tell of the best trials in Markdown, for those who meet the sweep in MLflow."""
    score = score_name(config.tune.objective)
    names = [*config.tune.space, "status", score, f"{score}_std", ORACLE]
    rows = [
        ["–" if pd.isna(row[name]) else _text(row[name]) for name in names] for row in table.head(MOST_TOLD).to_dict("records")
    ]
    words = f"Trials by {config.tune.objective}, the best first; {ORACLE} reads labels: for research."
    told = f"{words}\n\n{markdown_table(names, rows)}"
    return f"{told}\nThe best, with {CONFIG} out of the artifacts:\n\n{adapt_block(best)}" if best else told


def _by_method(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Group cells by method."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell.request.method, []).append(cell)
    return found


def _unadapted(config: Config, method: str, cells: Sequence[Cell]) -> dict[str, Any]:
    """A row for the model that a method starts from."""
    measured = [cell.measure_unadapted() for cell in cells]
    objective = config.tune.objective
    mean, spread = summary(measured, objective)
    return {
        "method": method,
        "status": "unadapted",
        "step": 0,
        score_name(objective): mean,
        "n_seeds": len({cell["seed"] for cell in measured}),
        **trial_measures({"cells": measured, "score_std": spread, "objective": objective}),
        "key": f"unadapted {method}",
    }
