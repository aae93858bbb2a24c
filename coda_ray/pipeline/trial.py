"""One trial of a sweep: the same hyperparameters on every pair and seed, scored now and then and at the end."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, stdev
from typing import Any

from coda_ray.config import Config, ConfigError
from coda_ray.pipeline import data
from coda_ray.pipeline.combine import combine
from coda_ray.pipeline.criteria import criteria
from coda_ray.pipeline.evaluate import evaluate
from coda_ray.pipeline.methods.plans import adaptation, answers
from coda_ray.pipeline.request import Model, Request
from coda_ray.pipeline.space import POINT, Point, config_at
from coda_ray.pipeline.stage import Stage, with_needs
from coda_ray.pipeline.task import run_missing
from coda_ray.pipeline.transfer import Transfer, model_of, score
from coda_ray.storage import Folder, open_place
from coda_ray.tiles.store import TileIndex, content_key
from coda_ray.training.checkpoints import CHECKPOINTS

# Of a trial, after which it is not run again.
ENDED = ("finished", "stopped")
ORACLE = "oracle_accuracy"
# Of a cell's record, what reads labels of the target; shown under a name that says so.
ORACLES = {ORACLE: "accuracy", "oracle_macro_f1": "macro_f1", "oracle_well_accuracy": "well_accuracy"}


@dataclass(frozen=True)
class Cell:
    """One adaptation of a trial: a source, a target, a seed; with granularity batch or plate, one for each unit.

    Parameters
    ----------
    config
        Settings at the trial's point.
    request
        What is adapted, from what, to what.
    """

    config: Config
    request: Request

    @cached_property
    def index(self) -> TileIndex:
        """The target's tiles."""
        return data.load_tiles(self.config, self.request.target)

    @cached_property
    def unadapted(self) -> Stage:
        """Predictions of the model before adaptation."""
        return evaluate(self.config, self.index, self.request.target, self._model.classifier)

    @cached_property
    def before(self) -> Stage:
        """Criteria of the model before adaptation; what every trial compares itself with, and the last that all share."""
        return criteria(self.config, self._had, self.unadapted, (), self.unadapted)

    @cached_property
    def _model(self) -> Model:
        return model_of(self.config, self.request)

    @cached_property
    def steps(self) -> int:
        """Length of the adaptation."""
        workload = self._trained(self._units[0], None).workload
        return workload.steps if workload else 0

    @cached_property
    def _units(self) -> list[str]:
        request = self.request
        return data.units_of(self.config, request.target, request.granularity, request.seed)

    def _trained(self, unit: str, until: int | None) -> Stage:
        return adaptation(self.config, self.request, self._model, self.request.granularity, unit, until)

    def after(self, until: int | None) -> tuple[Stage, Stage]:
        """Plan predictions and criteria after `until` steps, or at the end."""
        request = self.request
        trained = {unit: self._trained(unit, until) for unit in self._units}
        if request.granularity == "source":
            (whole,) = trained.values()
            evaluation = answers(self.config, self._model, request.target, self.index, request.target, whole)
        else:
            parts = {
                unit: answers(
                    self.config,
                    self._model,
                    request.target,
                    self.index.unit(request.granularity, unit),
                    f"{request.target} {unit}",
                    stage,
                )
                for unit, stage in trained.items()
            }
            title = f"{request.method} {request.source} to {request.target} per {request.granularity}, seed {request.seed}"
            evaluation = combine(self.config, title, request.granularity, parts)
        return evaluation, criteria(self.config, self._had, evaluation, tuple(trained.values()), self.unadapted)

    @cached_property
    def _had(self) -> TileIndex:
        """Tiles that the criteria measure: none of a compound that is held out of the adaptation."""
        return data.had(self.config, self.request.source, self.seen)

    @cached_property
    def seen(self) -> TileIndex:
        """Tiles of the units that are adapted to; on them the trial is scored."""
        if len(self._units) == len(self.index.units(self.request.granularity)):
            return self.index
        (unit,) = self._units
        return self.index.unit(self.request.granularity, unit)

    def finished(self, results: Folder) -> bool:
        """Whether the whole adaptation is there, of this sweep or of another job."""
        return all(self._trained(unit, None).facts(results) for unit in self._units)

    def drop_checkpoints(self, results: Folder) -> None:
        """Delete the checkpoints of adaptations that are finished, and of those that will not be."""
        for unit in self._units:
            results.delete(f"{self._trained(unit, None).path}/{CHECKPOINTS}")

    def measure(self, until: int | None) -> dict[str, Any]:
        """Run what is missing, and read the criteria and, apart from them, the oracles."""
        evaluation, last = self.after(until)
        found = self._measure(evaluation, last)
        if until is not None:
            self._forget(last, open_place(self.config.results))
        return found

    def measure_unadapted(self) -> dict[str, Any]:
        """Read what is known of the model before adaptation."""
        return self._measure(self.unadapted, self.before)

    def reason(self, name: str, until: int | None = None, *, unadapted: bool = False) -> str:
        """Tell why there is no such score: of the state after `until` steps, of the end, or of the model before adaptation."""
        last = self.before if unadapted else self.after(until)[1]
        reasons: dict[str, str] = (last.facts(open_place(self.config.results)) or {})["reasons"]
        told = reasons.get(name, "none of its tiles has a MoA label")
        return f"{name} cannot be measured on {self.request.target}: {told}"

    def _measure(self, evaluation: Stage, last: Stage) -> dict[str, Any]:
        """Run what is missing of a model's stages, and collect its criteria and oracles, unless that was done."""
        results, request = open_place(self.config.results), self.request
        # Criteria know no label, so their folder may be older than the labels.
        file = f"{last.path}/oracles-{self.labelled.fingerprint}.json"
        oracles, facts = results.read_json(file), last.facts(results)
        if oracles is None or facts is None:
            run_missing(with_needs([last]), self.config)
            oracles, facts = self._oracles(evaluation, results), last.facts(results) or {}
            results.write(file, json.dumps(oracles, indent=1).encode())
        return {"source": request.source, "target": request.target, "seed": request.seed, **facts["criteria"], **oracles}

    @cached_property
    def labelled(self) -> TileIndex:
        """Tiles that the oracles are scored on."""
        return data.scored(self.config, self.request.source, self.seen, self._model.classifier.inputs["classes"])

    def _oracles(self, evaluation: Stage, results: Folder) -> dict[str, float | None]:
        """Score with the target's labels; for research, never for a choice that claims not to need them."""
        records = list(score(self.config, results, [Transfer({}, evaluation, None, self.labelled)]))
        return {name: records[0][field] if records else None for name, field in ORACLES.items()}

    def _forget(self, last: Stage, results: Folder) -> None:
        """Delete weights, predictions and profiles of a state in the middle; its criteria stay."""
        kept = {stage.key for stage in with_needs([self.before])} | {last.key}
        for stage in with_needs([last]):
            if stage.key not in kept:
                results.delete(stage.path)


@dataclass(frozen=True)
class Trial:
    """Hyperparameters, and the adaptations that are made with them.

    Parameters
    ----------
    sweep
        Key of the sweep.
    point
        The values.
    cells
        One per pair and seed.
    objective
        Name of the score.
    score_every
        Steps between scores; 0 for the end alone.
    """

    sweep: str
    point: Point
    cells: tuple[Cell, ...]
    objective: str
    score_every: int

    @classmethod
    def at(cls, config: Config, sweep: str, point: Mapping[str, Any]) -> "Trial":
        """Make the trial of a point.

        Raises
        ------
        ConfigError
            When the point does not fit the configuration.
        """
        chosen = config_at(config, point)
        settings = chosen.tune
        cells = tuple(
            Cell(chosen, Request(source, target, settings.method, settings.granularity, seed, chosen.split))
            for source, target in settings.pairs
            for seed in settings.seeds
        )
        return cls(sweep, dict(point), cells, settings.objective, settings.score_every)

    @cached_property
    def key(self) -> str:
        """Hash of the stages at its end: points that end with the same stages are one trial."""
        try:
            return content_key({"ends": [cell.after(None)[1].key for cell in self.cells]})
        except ConfigError:  # of values that do not go together: it will fail, and tell why
            return content_key({POINT: self.point})

    @property
    def path(self) -> str:
        """Place of the trial's record in the results."""
        return f"sweeps/{self.sweep}/{self.key}.json"

    @property
    def steps(self) -> int:
        """Length of the longest adaptation."""
        return max(cell.steps for cell in self.cells)

    def run(self, tell: Callable[[Mapping[str, Any]], None]) -> None:
        """Adapt and score; the record in the results grows with every score.

        Parameters
        ----------
        tell
            Receives the record after each score; may end the trial by an exception.

        Raises
        ------
        ValueError
            When a state has no score; with the criterion's reason.
        """
        results = open_place(self.cells[0].config.results)
        begun, curve = time.monotonic(), []
        for until in self._stops(results):
            cells = [cell.measure(until) for cell in self.cells]
            mean, spread = summary(cells, self.objective)
            if mean is None:  # which neither Optuna nor ASHA can compare
                lacking = next(own for own, found in zip(self.cells, cells, strict=True) if found[self.objective] is None)
                raise ValueError(lacking.reason(self.objective, until))
            now = int(time.time() * 1000)
            curve.append({"step": until or self.steps, "score": mean, "time_ms": now, "cells": cells})
            record = {
                **self._identity,
                "status": "running" if until else "finished",
                "step": until or self.steps,
                "score": mean,
                "score_std": spread,
                "cells": cells,
                "curve": curve,
                "seconds": round(time.monotonic() - begun, 1),
            }
            results.write(self.path, json.dumps(record, indent=1).encode())
            if until is None:  # a finished adaptation among unfinished ones went through its states once more
                for cell in self.cells:
                    cell.drop_checkpoints(results)
            tell(record)

    def fail(self, reason: str) -> dict[str, Any]:
        """Record that the trial failed, beside the scores that it had reached.

        Parameters
        ----------
        reason
            One line.

        Returns
        -------
        dict
            The record.
        """
        results = open_place(self.cells[0].config.results)
        reached = results.read_json(self.path) or {}
        kept: dict[str, Any] = {name: reached[name] for name in ("step", "cells", "curve", "seconds") if name in reached}
        record = {**self._identity, **kept, "status": "failed", "score": None, "reason": reason}
        results.write(self.path, json.dumps(record, indent=1).encode())
        return record

    @property
    def _identity(self) -> dict[str, Any]:
        """What stands in every record of the trial."""
        return {"key": self.key, "sweep": self.sweep, POINT: self.point, "objective": self.objective}

    def _stops(self, results: Folder) -> list[int | None]:
        """Steps at which all cells are scored; None is the end."""
        if not self.score_every or all(cell.finished(results) for cell in self.cells):
            return [None]
        shortest = min(cell.steps for cell in self.cells)
        return [*range(self.score_every, shortest, self.score_every), None]


def summary(cells: Sequence[Mapping[str, Any]], name: str) -> tuple[float | None, float | None]:
    """Average a score over pairs, and take mean and standard deviation over seeds; None where a cell has none."""
    by_seed: dict[int, list[float]] = {}
    for cell in cells:
        if cell[name] is None:
            return None, None
        by_seed.setdefault(cell["seed"], []).append(cell[name])
    means = [fmean(values) for values in by_seed.values()]
    return fmean(means), stdev(means) if len(means) > 1 else None
