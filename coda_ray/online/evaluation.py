"""The honest online evaluation: the plates of a target arrive one by one, and each is predicted by what could be known then.

Labels of the target are read at the end, by the scores. What adaptations cost is what their stages noted.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from statistics import fmean
from typing import Any, cast

import pandas as pd
import pyarrow as pa
from rich.table import Table

from coda_ray.cluster import start_ray
from coda_ray.config import Config, ConfigError, Strategy, labs_of, told_in_one_line
from coda_ray.jump.layout import PlateName
from coda_ray.online import meter
from coda_ray.online.strategies import MEANING, Adaptation, Turn, turns_of
from coda_ray.pipeline import data
from coda_ray.pipeline.matrix import StagesFailedError, raise_failures, run_stages
from coda_ray.pipeline.methods.plans import TRAINED, answers
from coda_ray.pipeline.record import job_record, write_job
from coda_ray.pipeline.request import Model, Request
from coda_ray.pipeline.stage import Stage, with_needs
from coda_ray.pipeline.transfer import Transfer, model_of, score
from coda_ray.progress import Say, job_console
from coda_ray.storage import Folder, open_place
from coda_ray.tiles.store import content_key, table_bytes
from coda_ray.tracking.figures import figure_png
from coda_ray.tracking.records import read_record
from coda_ray.tracking.report_figures import online_figure
from coda_ray.tracking.runs import Tracker
from coda_ray.tracking.store import REPORT
from coda_ray.tracking.table import cell_text, markdown_table

# Columns where the output is no terminal.
WIDTH = 150
SCORES = ("accuracy", "accuracy_low", "accuracy_high", "macro_f1", "well_accuracy", "well_macro_f1")
COLUMNS = (
    *("strategy", "seed", "turn", "plate", "batch", "waits", "n_images", "n_wells"),
    *(*SCORES, "steps", "seconds", "steps_so_far", "seconds_so_far"),
)


@dataclass(frozen=True)
class Step:
    """One turn, in stages.

    Parameters
    ----------
    turn
        What is done.
    answer
        The predictions of the plate, and the labelled tiles that they are scored on.
    charged
        The adaptations whose cost the turn bears.
    """

    turn: Turn
    answer: Transfer
    charged: tuple[Stage, ...]


@dataclass(frozen=True)
class Course:
    """One strategy with one seed: a step per plate, in the order of arrival."""

    strategy: Strategy
    seed: int
    steps: tuple[Step, ...]

    @property
    def key(self) -> str:
        """Hash of everything that decides the scores and the costs."""
        charged = [[stage.key for stage in step.charged] for step in self.steps]
        answers = [step.answer.key for step in self.steps]
        return content_key({"strategy": self.strategy, "seed": self.seed, "answers": answers, "charged": charged})


@dataclass(frozen=True)
class Outcome:
    """What an online evaluation brought.

    Parameters
    ----------
    table
        One row per strategy, seed and turn: `COLUMNS`.
    summary
        One row per strategy, from `summary_of`.
    files
        Addresses of the table, the summary and the figure.
    ui_hint
        How to look at the runs in MLflow.
    """

    table: pd.DataFrame
    summary: pd.DataFrame
    files: list[str]
    ui_hint: str | None


def run_online(config: Config, command: str) -> int:
    """Run an online evaluation to its exit code, and print its summary.

    Parameters
    ----------
    config
        Settings.
    command
        The command line.

    Returns
    -------
    int
        0.

    Raises
    ------
    SystemExit
        With code 1 when stages failed, with code 2 when settings or tiles do not allow it.
    """
    console = job_console(WIDTH)
    tell = partial(console.print, soft_wrap=True, markup=False, highlight=False)
    with told_in_one_line(sys.argv[0], StagesFailedError):
        _check(config)
        start_ray()
        try:
            outcome = compare(config, command, tell)
        except FileNotFoundError as error:  # tiles that are not there
            raise ConfigError(str(error)) from error
    console.print(render_summary(outcome.summary, _title(config)))
    for address in outcome.files:
        tell(address)
    if outcome.ui_hint:
        tell(f"MLflow: {outcome.ui_hint}")
    return 0


def compare(config: Config, command: str, say: Say) -> Outcome:
    """Run what is missing of an online evaluation, score every plate, and log it; the same again only looks up.

    Parameters
    ----------
    config
        Settings; section `online` says what is compared.
    command
        The command line, for MLflow.
    say
        Receives lines of progress.

    Returns
    -------
    Outcome
        Tables; they are in `report/<job key>/` of the results too, and each course in `online/<job key>/`.

    Raises
    ------
    ConfigError
        Before anything runs, when section `online` is not whole.
    DataError
        Before anything runs, when tiles, labels or partners are not there.
    StagesFailedError
        When stages failed; the others are finished and kept.
    """
    results, courses = open_place(config.results), plan_courses(config)
    stages = with_needs(stage for course in courses for step in course.steps for stage in (*step.charged, step.answer.evaluation))
    job = _job(config, command, courses, stages)
    write_job(results, job)
    tracker = Tracker.open(config.tracking, results)
    try:
        tracker.start_job(job)
        raise_failures(run_stages(config, stages, say, tracker))
        records = [_record(config, results, job["key"], course) for course in courses]
        for record in records:
            tracker.course(record)
        return _conclude(config, results, job, records, tracker)
    finally:
        tracker.close()


def plan_courses(config: Config) -> list[Course]:
    """Plan every strategy with every seed.

    Parameters
    ----------
    config
        Settings.

    Returns
    -------
    list of Course
        Seed by seed; strategies in the order in which they are named.

    Raises
    ------
    ConfigError
        When section `online` is not whole, or `adapt.plates` is set.
    DataError
        When tiles, labels or partners are not there.
    """
    _check(config)
    settings = config.online
    source, target = cast(str, settings.source), cast(str, settings.target)
    requests = [Request(source, target, settings.method, "plate", seed, config.split) for seed in dict.fromkeys(settings.seeds)]
    return [_course(config, request, strategy) for request in requests for strategy in dict.fromkeys(settings.strategies)]


def _check(config: Config) -> None:
    """Refuse a section `online` that is not whole, or that `adapt.plates` contradicts."""
    settings = config.online
    for field in ("source", "target", "strategies", "seeds"):
        if not getattr(settings, field):
            raise ConfigError(f"online.{field} is empty; give --online.{field}, or online.{field} in the configuration file")
    if settings.target in labs_of(cast(str, settings.source)):
        raise ConfigError(f"online.target = {settings.target!r}: it is the source too, or a lab of it; name another")
    if config.adapt.plates:
        raise ConfigError(
            f"adapt.plates = {config.adapt.plates}: the order of arrival says which plates are known; leave it empty"
        )


def plates_of(config: Config, target: str) -> list[PlateName]:
    """List the plates of a target in the order of arrival: by batch and name."""
    return sorted(meter.plates_of(data.load_tiles(config, target)))


def _course(config: Config, request: Request, strategy: Strategy) -> Course:
    """Make stages of a strategy's turns."""
    model, index = model_of(config, request), data.load_tiles(config, request.target)
    counted = data.scored(config, request.source, index, model.classifier.inputs["classes"])
    if not len(counted):
        raise data.DataError(
            f"online.target = {request.target!r}: none of its tiles has a MoA label that {request.source} knows, so nothing can "
            "be scored; give the MoA tables to jobs/ingest.py"
        )
    stages, steps = dict[Adaptation, Stage](), list[Step]()
    for turn in turns_of(strategy, plates_of(config, request.target)):
        if turn.model and turn.model not in stages:
            stages[turn.model] = _adapted(config, request, model, turn.model, stages)
        trained, name = stages[turn.model] if turn.model else None, turn.plate.plate
        told = answers(config, model, request.target, index.unit("plate", name), f"{request.target} plate {name}", trained)
        answer = Transfer({"turn": turn.number}, told, trained, counted.unit("plate", name))
        steps.append(Step(turn, answer, tuple(stages[one] for one in turn.charged)))
    return Course(strategy, request.seed, tuple(steps))


def _adapted(config: Config, request: Request, model: Model, wanted: Adaptation, stages: dict[Adaptation, Stage]) -> Stage:
    """Plan one adaptation, which knows of the plates that had arrived and of no other."""
    knowing = config.model_copy(update={"adapt": config.adapt.model_copy(update={"plates": list(wanted.known)})})
    return TRAINED[request.method](
        knowing,
        model,
        request.target,
        granularity=wanted.granularity,
        unit=wanted.unit,
        seed=request.seed,
        start=stages[wanted.start] if wanted.start else None,
    )


def _title(config: Config) -> str:
    """Name what is compared."""
    settings = config.online
    return f"plates of {settings.target} as they arrive, {settings.method} from {settings.source}"


def _job(config: Config, command: str, courses: Sequence[Course], stages: Sequence[Stage]) -> dict[str, Any]:
    """Describe the job for MLflow; it is not whole until everything is scored."""
    settings = config.online
    record = job_record(
        config,
        key=content_key({"kind": "online", "courses": [course.key for course in courses]}),
        kind="online",
        name=f"{_title(config)}: {', '.join(dict.fromkeys(settings.strategies))}",
        command=command,
        pairs=[(cast(str, settings.source), cast(str, settings.target))],
        transfers=[],
        stages=stages,
    )
    return {**record, "whole": False}


def _record(config: Config, results: Folder, job: str, course: Course) -> dict[str, Any]:
    """Look up a course, or score it and keep it."""
    path = f"online/{job}/{course.key}.json"
    if results.exists(path):
        return read_record(results, path)
    settings, turns = config.online, list(_turns(config, results, course))
    known = {name: [turn[name] for turn in turns if turn[name] is not None] for name in SCORES}
    record = {
        "key": course.key,
        "job": job,
        "strategy": course.strategy,
        "about": MEANING[course.strategy],
        "seed": course.seed,
        "source": settings.source,
        "target": settings.target,
        "method": settings.method,
        "scores": {
            **{name: fmean(known[name]) for name in ("accuracy", "macro_f1", "well_accuracy", "well_macro_f1")},
            "waits": fmean(turn["waits"] for turn in turns),
            "steps": turns[-1]["steps_so_far"],
            "seconds": turns[-1]["seconds_so_far"],
        },
        "turns": turns,
        "time_ms": int(time.time() * 1000),
    }
    results.write(path, json.dumps(record, indent=1).encode())
    return record


def _turns(config: Config, results: Folder, course: Course) -> Iterator[dict[str, Any]]:
    """Score every step, and add up the costs; a plate without a labelled tile has costs alone."""
    scored = {record["turn"]: record for record in score(config, results, [step.answer for step in course.steps])}
    costs = [[stage.facts(results) or {} for stage in step.charged] for step in course.steps]
    steps, seconds = ([sum(fact[name] for fact in facts) for facts in costs] for name in ("steps", "seconds"))
    so_far = zip(steps, seconds, accumulate(steps), accumulate(seconds), strict=True)
    for step, cost in zip(course.steps, so_far, strict=True):
        turn, found = step.turn, scored.get(step.turn.number, {})
        yield {
            "turn": turn.number,
            "plate": turn.plate.plate,
            "batch": turn.plate.batch,
            "waits": turn.waits,
            **{name: found.get(name, 0) for name in ("n_images", "n_wells")},
            **{name: found.get(name) for name in SCORES},
            **dict(zip(("steps", "seconds", "steps_so_far", "seconds_so_far"), cost, strict=True)),
        }


def _conclude(
    config: Config, results: Folder, job: dict[str, Any], records: Sequence[dict[str, Any]], tracker: Tracker
) -> Outcome:
    """Write the tables and the figure, and end the job."""
    rows = [{"strategy": record["strategy"], "seed": record["seed"], **turn} for record in records for turn in record["turns"]]
    table = pd.DataFrame(rows, columns=list(COLUMNS)).astype(dict.fromkeys(SCORES, "float64"))
    summary = summary_of(records)
    figure = online_figure(table, f"{_title(config)}, {_seeds(summary)}")
    files = {
        "online.csv": table.to_csv(index=False).encode(),
        "online.parquet": table_bytes(pa.Table.from_pandas(table, preserve_index=False)),
        "summary.csv": summary.to_csv(index=False).encode(),
        "online.png": figure_png(figure),
    }
    folder = results.child(f"{REPORT}/{job['key']}")
    for name, content in files.items():
        folder.write(name, content)
    means = {f"accuracy_{row.strategy}": row.accuracy_mean for row in summary.itertuples()}
    told = f"Mean over plates, {_seeds(summary)}.\n\n{markdown_table(*_cells(summary))}"
    job |= {"whole": True, "summary": told, "scores": means}
    write_job(results, job)
    tracker.finish_job(job)
    tracker.report(job, files)
    return Outcome(table, summary, [folder.address(name) for name in files], tracker.ui_hint)


def summary_of(records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Average courses over seeds.

    Parameters
    ----------
    records
        As in `online/<job key>/<course key>.json`.

    Returns
    -------
    DataFrame
        One row per strategy: of each score and cost of a course `<name>_mean` and `<name>_std` (NaN with one seed), and
        `n_seeds`.
    """
    frame = pd.DataFrame([{"strategy": record["strategy"], **record["scores"]} for record in records])
    groups = frame.groupby("strategy", sort=False)
    spread = groups.mean().add_suffix("_mean").join(groups.std().add_suffix("_std"))
    return spread.join(groups.size().rename("n_seeds")).reset_index()


def render_summary(summary: pd.DataFrame, title: str) -> Table:
    """Lay a summary out for the terminal.

    Parameters
    ----------
    summary
        From `summary_of`.
    title
        What is compared.
    """
    header, rows = _cells(summary)
    table = Table(title=f"{title}: mean over plates, {_seeds(summary)}")
    for name in header:
        table.add_column(name, justify="left" if name == header[0] else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _cells(summary: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a summary, as text."""
    scores = {"accuracy (%)": "accuracy", "macro-F1 (%)": "macro_f1", "accuracy of wells (%)": "well_accuracy"}
    header = ["strategy", *scores, "plates waited for", "steps", "seconds", "seeds"]
    rows = [
        [
            row["strategy"],
            *[cell_text(row[f"{name}_mean"], row[f"{name}_std"]) for name in scores.values()],
            f"{row['waits_mean']:.1f}",
            f"{row['steps_mean']:.0f}",
            f"{row['seconds_mean']:.0f}" + ("" if pd.isna(row["seconds_std"]) else f" ± {row['seconds_std']:.0f}"),
            str(row["n_seeds"]),
        ]
        for row in summary.to_dict("records")
    ]
    return header, rows


def _seeds(summary: pd.DataFrame) -> str:
    """Say over how many seeds the means go."""
    number = int(summary["n_seeds"].max())
    return f"mean ± std over {number} seeds" if number > 1 else "1 seed"
