"""Running transfers: every stage once, side by side on the Ray cluster, then scores, tables and MLflow."""

import json
import logging
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import pandas as pd
import ray

from coda_ray.config import Config, ConfigError, labs_of
from coda_ray.pipeline.display import Display, display_of
from coda_ray.pipeline.record import TRAINING, job_record, write_job
from coda_ray.pipeline.request import Model, Request
from coda_ray.pipeline.stage import Stage
from coda_ray.pipeline.task import Facts, cause_of, check_resources, interrupt, room, submit
from coda_ray.pipeline.transfer import Transfer, plan, score, stages_of, unadapted
from coda_ray.progress import Say
from coda_ray.storage import Folder, open_place
from coda_ray.tiles.store import content_key
from coda_ray.tracking.figures import figure_png, matrix_figures
from coda_ray.tracking.records import read_history
from coda_ray.tracking.runs import Tracker
from coda_ray.tracking.table import compile_transfers, job_matrix, ranking
from coda_ray.training.loop import Report

log = logging.getLogger(__name__)


class StagesFailedError(RuntimeError):
    """Some stages failed; the others are finished and kept."""


@dataclass
class Outcome:
    """What a job brought.

    Parameters
    ----------
    transfers
        Rows of `transfers.parquet` that belong to this job.
    matrix
        Tidy table of every score and granularity.
    heatmaps
        Addresses of the pictures.
    unscored
        Title and address of the predictions and embeddings of tiles that have no MoA label.
    ui_hint
        How to look at the runs in MLflow.
    """

    transfers: pd.DataFrame
    matrix: pd.DataFrame
    heatmaps: list[str]
    unscored: dict[str, str]
    ui_hint: str | None = None


def requests_of(config: Config) -> list[Request]:
    """List every cell of a matrix: each source to each target that is no lab of it, and each source on its own held-out plates.

    Raises
    ------
    ConfigError
        When one of the matrix's lists is empty.
    """
    matrix = config.matrix
    for field in ("sources", "targets", "methods", "granularities", "splits", "seeds"):
        if not getattr(matrix, field):
            raise ConfigError(f"matrix.{field} is empty; name at least one in the configuration file")
    across = product(matrix.splits, matrix.seeds, matrix.methods, matrix.granularities, matrix.sources, matrix.targets)
    within = product(matrix.splits, matrix.seeds, matrix.methods, matrix.sources)
    cells = [
        Request(s, t, method, granularity, seed, split)
        for split, seed, method, granularity, s, t in across
        if t not in labs_of(s)
    ]
    return cells + [Request(s, s, unadapted(config, method), "plate", seed, split) for split, seed, method, s in within]


def plan_all(config: Config, requests: Sequence[Request], model: Model | None = None) -> list[Transfer]:
    """Plan every transfer of some requests, each once; `model` is an imported one, which they all start from.

    Raises
    ------
    DataError
        When tiles, labels or partners are not there.
    """
    return list({t.key: t for request in requests for t in plan(config, request, model)}.values())


def job_key(kind: str, requests: Sequence[Request], stages: Sequence[Stage]) -> str:
    """Name a job by what it is asked for and the stages that answer it."""
    return content_key({"kind": kind, "requests": [vars(request) for request in requests], "stages": [s.key for s in stages]})


def run_stages(config: Config, stages: Sequence[Stage], say: Say, tracker: Tracker | None = None) -> dict[str, str]:
    """Run what is missing of some stages that no transfer is scored by; what they need is finished or among them.

    Parameters
    ----------
    config
        Settings.
    stages
        Each after those it needs.
    say
        Receives lines of progress.
    tracker
        Receives the curves of those that train; None sends none.

    Returns
    -------
    dict
        Title to reason of those that failed; those that stand on them are not named.
    """
    runner = _Runner(config, open_place(config.results), [], stages, tracker or Tracker(None), say)
    runner.run()
    return runner.failures


def raise_failures(failures: Mapping[str, str]) -> None:
    """Raise what `run_stages` gave, where that is anything.

    Parameters
    ----------
    failures
        Title of a stage to its reason.

    Raises
    ------
    StagesFailedError
        Names each stage and its reason.
    """
    if failures:
        told = "\n".join(f"  {title}: {reason}" for title, reason in failures.items())
        raise StagesFailedError(
            f"{len(failures)} stage(s) failed; those that do not need them are finished:\n{told}\n"
            "the same command again runs what is missing"
        )


def run_transfers(
    config: Config,
    requests: Sequence[Request],
    *,
    kind: str,
    name: str,
    command: str,
    say: Say,
    model: Model | None = None,
) -> Outcome:
    """Run what is missing of some requests, score them, and log them.

    Parameters
    ----------
    config
        Settings.
    requests
        Cells of the matrix.
    kind, name, command
        What the job is called, for MLflow: `adapt` or `matrix`, a title, the command line.
    say
        Receives lines of progress.
    model
        An imported model, which all start from; None plans them from the sources' tiles.

    Returns
    -------
    Outcome
        Tables of this job.

    Raises
    ------
    DataError
        Before anything runs, when tiles, labels or partners are not there.
    StagesFailedError
        At the end, when stages failed; whatever could be finished is.
    """
    results = open_place(config.results)
    transfers = plan_all(config, requests, model)
    stages = stages_of(transfers)
    job = job_record(
        config,
        key=job_key(kind, requests, stages),
        kind=kind,
        name=name,
        command=command,
        pairs=[(None if model else request.source, request.target) for request in requests],
        transfers=[transfer.key for transfer in transfers if len(transfer.index)],
        stages=stages,
    )
    write_job(results, job)
    tracker = Tracker.open(config.tracking, results)
    try:
        tracker.start_job(job)
        runner = _Runner(config, results, transfers, stages, tracker, say)
        runner.run()
        table = compile_transfers(results)
        outcome = _tables(results, job, table, tracker, complete=not runner.failed)
        outcome.ui_hint = tracker.ui_hint
        for transfer in transfers:
            if not len(transfer.index):
                outcome.unscored[transfer.evaluation.title] = results.address(transfer.evaluation.path)
    finally:
        tracker.close()
    if runner.failed:
        told = "\n".join(f"  {title}: {reason}" for title, reason in runner.failures.items())
        raise StagesFailedError(
            f"{len(runner.failures)} of {len(stages)} stages failed, {len(runner.failed) - len(runner.failures)} more need "
            f"them; the rest is finished:\n{told}\nthe same command again runs only what is missing"
        )
    return outcome


def _tables(results: Folder, job: dict[str, Any], table: pd.DataFrame, tracker: Tracker, *, complete: bool) -> Outcome:
    """Tabulate and draw a job's transfers; only a complete job ends as finished in MLflow."""
    own = table[table["key"].isin(job["transfers"])].reset_index(drop=True)
    if own.empty:
        if complete:
            tracker.finish_job(job)
        return Outcome(own, own, [], {})
    matrix = job_matrix(table, job)
    folder = f"jobs/{job['key']}"
    results.write(f"{folder}/matrix.csv", matrix.to_csv(index=False).encode())
    ranked = ranking(matrix)
    if ranked:
        results.write(f"{folder}/ranking.csv", pd.concat(ranked).to_csv(index=False).encode())
    figures = matrix_figures(matrix)
    for name, figure in figures.items():
        results.write(f"{folder}/{name}.png", figure_png(figure))
    if complete:
        tracker.finish_job(job, matrix, figures)
    return Outcome(own, matrix, [results.address(f"{folder}/{name}.png") for name in figures], {})


class _Runner:
    """Hands the stages to Ray, in an order in which each stands after those it needs; Ray packs them."""

    def __init__(
        self,
        config: Config,
        results: Folder,
        transfers: Sequence[Transfer],
        stages: Sequence[Stage],
        tracker: Tracker,
        say: Say,
    ) -> None:
        self.config, self.results, self.tracker, self.say = config, results, tracker, say
        self.stages = stages
        self.scored: dict[str, list[Transfer]] = defaultdict(list)
        self.trained: dict[str, list[Transfer]] = defaultdict(list)
        for transfer in transfers:
            self.scored[transfer.last.key].append(transfer)
            if transfer.trained and len(transfer.index):
                self.trained[transfer.trained.key].append(transfer)
        self.running: dict[Facts, Stage] = {}
        self.references: dict[str, Facts] = {}
        self.failures: dict[str, str] = {}
        self.failed: set[str] = set()
        self.finished = 0
        self.display = Display()

    def run(self) -> None:
        """Run every stage; `failures` then holds the reasons of those that failed, `failed` also what needed them."""
        done = {stage.key for stage in self.stages if stage.facts(self.results) is not None}
        self.finished = len(done)
        self.say(f"{len(self.stages)} stages, {len(done)} of them finished before")
        finished = deque(stage for stage in self.stages if stage.key in done)
        missing = deque(stage for stage in self.stages if stage.key not in done)
        if missing:
            check_resources(self.config.train, self.say)
        for note in dict.fromkeys(stage.note for stage in missing if stage.note):
            self.say(note)
        limit = self._at_a_time()
        with display_of(self.stages, done, self.config.train) as self.display:
            try:
                while missing or self.running or finished:
                    while missing and len(self.running) < limit:
                        self._submit(missing.popleft())
                    # Looking up comes after submitting, so that the cluster has work meanwhile.
                    if finished:
                        self._score(finished.popleft())
                    elif self.running:
                        self._wait()
            except BaseException:
                interrupt(list(self.running))
                raise

    def _submit(self, stage: Stage) -> None:
        """Hand one stage to Ray; it starts when its needs are finished and its resources free."""
        needs = [self.references[need.key] for need in stage.needs if need.key in self.references]
        reference = submit(stage, self.config, self._report(stage), needs, self.display.teller(stage))
        self.references[stage.key] = reference
        self.running[reference] = stage

    def _report(self, stage: Stage) -> Report | None:
        """Choose where a stage's curve is shown while it grows."""
        of_transfer = self.trained.get(stage.key)
        if of_transfer:
            transfer = of_transfer[0]
            return self.tracker.live({**transfer.identity, "key": transfer.key})
        return self.tracker.live_stage(stage.title, stage.key) if stage.kind in TRAINING else None

    def _wait(self) -> None:
        """Take the next stage that ends."""
        reference = self.display.wait(list(self.running))
        stage = self.running.pop(reference)
        try:
            ray.get(reference)
        except ray.exceptions.RayError as error:
            log.debug("%s failed", stage.title, exc_info=error)
            self.display.ended(stage, failed=True)
            self._fail(stage, cause_of(error))
            return
        self.finished += 1
        self.display.ended(stage, failed=False)
        self.say(f"[{self.finished}/{len(self.stages)}] {stage.title}")
        self._score(stage)

    def _score(self, stage: Stage) -> None:
        """Send a finished stage's curve, and score the transfers that it answers for."""
        if stage.kind in TRAINING and stage.key not in self.trained:
            self.tracker.stage(stage.title, stage.key, read_history(self.results, stage.path))
        wanted = self.scored.get(stage.key, [])
        known = [self.results.read_json(f"transfers/{transfer.key}.json") for transfer in wanted]
        try:
            fresh = list(score(self.config, self.results, [t for t, record in zip(wanted, known, strict=True) if not record]))
        except (ValueError, KeyError) as error:  # predictions that cannot be scored: the others can
            self._fail(stage, error)
            return
        for record in fresh:
            self.results.write(f"transfers/{record['key']}.json", json.dumps(record, indent=1).encode())
        for record in filter(None, [*known, *fresh]):
            self.tracker.transfer(record, read_history(self.results, record["history"]))

    def _fail(self, stage: Stage, error: BaseException) -> None:
        """Note why a stage failed; what could not run because of it is counted, not told again."""
        self.failed.add(stage.key)
        if any(need.key in self.failed for need in stage.needs):
            return
        said = str(error).strip()
        self.failures[stage.title] = f"{type(error).__name__}: {said.splitlines()[0] if said else ''}"
        self.say(f"failed: {stage.title}: {self.failures[stage.title]}")

    def _at_a_time(self) -> int:
        """How many stages are handed out: any number of small ones, which Ray queues; of worker groups what fits."""
        inside = self.config.train.worker_range[0] == 0
        return max(1, len(self.stages)) if inside else room(self.config.train)
