"""Optuna's choice of the points of a sweep, for Ray Tune: each trial once, with what earlier drivers found."""

from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from ray.tune.search import Searcher

from coda_ray.config import Config, ConfigError, Range
from coda_ray.pipeline.space import POINT, Domain, Point, known_points
from coda_ray.pipeline.trial import ENDED, Trial

# Suggestions in a row that are trials already, before another is looked for in the list of all, or the search ends.
MOST_KNOWN = 20


class OptunaSearcher(Searcher):
    """Suggests points by TPE, until every trial of the space was made.

    Parameters
    ----------
    config
        Settings.
    sweep
        Key of the sweep.
    records
        Of its trials. Finished ones tell their score, those that were stopped early the scores on their way; what failed or was
        interrupted is suggested first.
    mode
        `max` or `min`.
    """

    def __init__(self, config: Config, sweep: str, records: Sequence[Mapping[str, Any]], mode: str) -> None:
        super().__init__(metric="score", mode=mode)
        self.config, self.sweep = config, sweep
        self.exhausted = False
        ended = [record for record in records if record["status"] in ENDED]
        self.trials = {str(record["key"]) for record in ended}
        self.listed = self._listed()
        self._space = {name: _distribution(domain) for name, domain in config.tune.space.items()}
        self._running: dict[str, tuple[optuna.Trial, int]] = {}
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(
            direction="maximize" if mode == "max" else "minimize",
            # Another seed, or the points of before would be drawn again.
            sampler=optuna.samplers.TPESampler(seed=config.tune.seed + len(ended)),
        )
        for record in records:
            if record["status"] in ENDED:
                self._study.add_trial(self._found(record))
            else:
                self._study.enqueue_trial(record[POINT])

    def suggest(self, trial_id: str) -> Any:
        """Choose the point of a trial that there is not yet; `Searcher.FINISHED` where there is none."""
        for _ in range(MOST_KNOWN):
            asked = self._study.ask(self._space)
            trial = Trial.at(self.config, self.sweep, asked.params)
            if trial.key not in self.trials:
                return self._take(trial_id, asked, trial)
            self._study.tell(asked, state=TrialState.FAIL)
        for key, point in self.listed.items():
            if key not in self.trials:
                self._study.enqueue_trial(point)
                return self._take(trial_id, self._study.ask(self._space), Trial.at(self.config, self.sweep, point))
        self.exhausted = True
        return Searcher.FINISHED

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Tell Optuna a score on the way."""
        asked, _ = self._running[trial_id]
        asked.report(result["score"], result["step"])

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """Tell Optuna the end of a trial: its score, that it was stopped early, or that it failed."""
        asked, steps = self._running.pop(trial_id)
        if error or not result or "score" not in result:
            self._study.tell(asked, state=TrialState.FAIL)
        elif result["step"] < steps:
            self._study.tell(asked, state=TrialState.PRUNED)
        else:
            self._study.tell(asked, result["score"])

    def save(self, checkpoint_path: str) -> None:
        """Keep nothing: a sweep continues from the records of its trials."""

    def _take(self, trial_id: str, asked: optuna.Trial, trial: Trial) -> dict[str, Point]:
        """Begin a trial."""
        self.trials.add(trial.key)
        try:
            steps = trial.steps
        except ConfigError:  # of values that do not go together: it will fail, and tell why
            steps = 0
        self._running[trial_id] = asked, steps
        return {POINT: trial.point}

    def _found(self, record: Mapping[str, Any]) -> FrozenTrial:
        """Say a record in Optuna's words."""
        finished = record["status"] == "finished"
        return create_trial(
            state=TrialState.COMPLETE if finished else TrialState.PRUNED,
            value=record["score"] if finished else None,
            params=record[POINT],
            distributions=self._space,
            intermediate_values={stop["step"]: stop["score"] for stop in record.get("curve", [])},
        )

    def _listed(self) -> dict[str, Point]:
        """List every trial of a space of lists, by its key; none where there are ranges or very many combinations."""
        points = known_points(self.config.tune)
        return {Trial.at(self.config, self.sweep, point).key: point for point in reversed(points)}


def _distribution(domain: Domain) -> BaseDistribution:
    """Say a domain in Optuna's words."""
    if not isinstance(domain, Range):
        return CategoricalDistribution(domain)
    if domain.whole:
        return IntDistribution(round(domain.low), round(domain.high), log=domain.log)
    return FloatDistribution(domain.low, domain.high, log=domain.log)
