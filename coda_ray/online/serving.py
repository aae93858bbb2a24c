"""The models that a watcher predicts with: that of the source, and one for each unit that was adapted to."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from coda_ray.config import Config, ConfigError, Granularity, labs_of
from coda_ray.jump.prepare import preparation_of
from coda_ray.methods import row_of
from coda_ray.pipeline.matrix import raise_failures, run_stages
from coda_ray.pipeline.methods.plans import TRAINED
from coda_ray.pipeline.models import Export, StoredModel, export_of, read_stage, stored_models
from coda_ray.pipeline.record import job_record, write_job
from coda_ray.pipeline.request import Request
from coda_ray.pipeline.stage import DONE, Stage, settings_of, with_needs
from coda_ray.pipeline.transfer import model_of
from coda_ray.progress import Say
from coda_ray.storage import Folder, open_place
from coda_ray.tiles.store import TileStore, content_key
from coda_ray.tracking.records import WATCH
from coda_ray.tracking.runs import Tracker


def watch_folder(config: Config) -> Folder:
    """Open the folder of the ledger, the lease and the report."""
    if config.watch.out:
        return open_place(config.results.model_copy(update={"address": config.watch.out}))
    return open_place(config.results).child(WATCH)


@dataclass(frozen=True)
class Choice:
    """A model, as the ledger keeps it.

    Parameters
    ----------
    stage
        Path of the stage that made it, below the results.
    target, granularity, unit
        What it was adapted to; the source itself, for the model that was not.
    plates
        What the adaptation knew of; empty where the watcher did not make it.
    """

    stage: str
    target: str
    granularity: Granularity
    unit: str
    plates: tuple[str, ...] = ()

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> "Choice":
        """Read what the ledger noted."""
        return cls(facts["stage"], facts["target"], facts["granularity"], facts["unit"], tuple(facts["plates"]))

    @property
    def facts(self) -> dict[str, Any]:
        """What the ledger notes."""
        return {**asdict(self), "plates": list(self.plates)}

    @property
    def text(self) -> str:
        """For people."""
        return self.unit if self.granularity == "source" else f"{self.target} {self.granularity} {self.unit}"


class Models:
    """Plans, makes and gives the models of one watcher.

    Parameters
    ----------
    config
        Settings; section `watch` names source, method and seed.
    command
        The command line, for the records.
    tracker
        Shows the curves of training.
    say
        Receives lines of progress.

    Raises
    ------
    ConfigError
        When `watch.source` is unset, or when adapted models are to be standardised.
    """

    def __init__(self, config: Config, command: str, tracker: Tracker, say: Say) -> None:
        settings = config.watch
        if settings.source is None:
            raise ConfigError("watch.source is unset; give --watch.source NAME, the source whose model is used")
        if config.adapt.standardise == "after":
            raise ConfigError(
                "adapt.standardise = 'after': a watcher reads each plate by the adapted model as it is; "
                "give --adapt.standardise never"
            )
        self.config, self.command, self.tracker, self.say = config, command, tracker, say
        self.results = open_place(config.results)
        request = Request(settings.source, settings.source, settings.method, "source", settings.seed, config.split)
        self.base = model_of(config, request)
        self.source = Choice(self.base.classifier.path, settings.source, "source", settings.source)
        self.record: dict[str, Any] = {}
        # Paths of the adaptations of this watcher.
        self._own: set[str] = set()
        self._finished: dict[str, StoredModel] = {}

    @property
    def identity(self) -> dict[str, Any]:
        """What one ledger stands for: a change of it would make another's plates out of these."""
        config, settings = self.config, self.config.watch
        adapting: dict[str, Any] = {"adapt": settings_of(config.adapt), settings.method: self.base.classifier.key}
        own = row_of(settings.method).section
        if own and own != "adapt":
            adapting[f"section {own}"] = settings_of(getattr(config, own))
        return {
            "bucket.address": config.bucket.address,
            "ingest.dataset": config.ingest.dataset,
            "tiles": content_key(preparation_of(config)),
            **{f"watch.{name}": getattr(settings, name) for name in ("source", "method", "seed")},
            "watch.source's model and how it is adapted": content_key(adapting),
        }

    @property
    def key(self) -> str:
        """Key of the watcher's job; another ledger is another job."""
        return content_key({"kind": "watch", "ledger": watch_folder(self.config).address(), **self.identity})

    def begin(self) -> None:
        """Begin the watcher's job: train what is missing of the source's model.

        Raises
        ------
        StagesFailedError
            When that fails.
        """
        upstream = with_needs([self.base.classifier])
        self._note_job()
        self.tracker.start_job(self.record)
        raise_failures(run_stages(self.config, upstream, self.say, self.tracker))
        self._own = set(self._stages_before())
        models = (model for model in stored_models(self.results) if model.classifier.key == self.base.classifier.key)
        self._finished = {model.last.path: model for model in models if model.adapted}

    def of_others(self) -> list[Choice]:
        """List the units that the source's model was adapted to by other jobs, in the same way, when the watcher began."""
        wanted = (self.config.watch.method, self.config.watch.seed)
        origins = {path: model.origin for path, model in self._finished.items() if path not in self._own}
        found = {path: origin for path, origin in origins.items() if (origin.method, origin.seed) == wanted}
        return [Choice(path, o.target, o.granularity, o.unit) for path, o in sorted(found.items())]

    def adapted_to(self, target: str, granularity: Granularity, unit: str, plates: Sequence[str]) -> Choice:
        """Plan the adaptation to a unit by what is known of the target.

        Parameters
        ----------
        target, granularity, unit
            The unit.
        plates
            What the adaptation may know of.

        Raises
        ------
        DataError
            When tiles have no partner and `adapt.no_partner` is `error`.
        """
        stage = self._plan(target, granularity, unit, plates)
        return Choice(stage.path, target, granularity, unit, tuple(plates))

    def make(self, choices: Iterable[Choice]) -> dict[str, str]:
        """Train those of some models that are not finished, side by side.

        Returns
        -------
        dict
            Path of the stage to reason of those that failed.
        """
        stages, failed = dict[str, Stage](), dict[str, str]()
        for choice in choices:
            if choice.plates:
                try:
                    stages[choice.stage] = self._stage(choice)
                except (ValueError, FileNotFoundError) as error:  # its tiles have changed
                    failed[choice.stage] = str(error)
        if not stages:
            return failed
        self._own |= stages.keys()
        self._note_job()
        told = run_stages(self.config, list(stages.values()), self.say, self.tracker)
        return failed | {path: told[stage.title] for path, stage in stages.items() if stage.title in told}

    def has(self, choice: Choice) -> bool:
        """Whether a model is there, or can be made."""
        return bool(choice.plates) or choice.stage in (self.source.stage, *self._finished)

    def export(self, choice: Choice) -> Export:
        """Give a finished model in the form that stands alone."""
        if choice.stage == self.source.stage:
            return export_of(self.config, StoredModel(self.base.classifier, None))
        if choice.plates:
            return export_of(self.config, StoredModel(self.base.classifier, self._stage(choice)))
        if choice.stage not in self._finished:
            raise ConfigError(f"{self.results.address(choice.stage)}: the model of {choice.text} is not there any more")
        return export_of(self.config, self._finished[choice.stage])

    def seconds(self, choice: Choice) -> float:
        """How long the adaptation of a model took (s); 0 for one that was there."""
        return float((self._stage(choice).facts(self.results) or {}).get("seconds", 0.0)) if choice.plates else 0.0

    def _stage(self, choice: Choice) -> Stage:
        """Read the adaptation of a choice back, or plan it again where it is not finished.

        Raises
        ------
        ConfigError
            When it is not finished, and would be another one now.
        """
        # Tiles that it knew of may have been prepared anew since.
        if self.results.exists(f"{choice.stage}/{DONE}"):
            return read_stage(self.results, choice.stage)
        stage = self._plan(choice.target, choice.granularity, choice.unit, choice.plates)
        if stage.path != choice.stage:
            raise ConfigError(f"{choice.text}: tiles or settings have changed since this model was chosen, and it cannot be made")
        return stage

    def _plan(self, target: str, granularity: Granularity, unit: str, plates: Sequence[str]) -> Stage:
        """Plan an adaptation that knows of some plates."""
        config = self.config
        knowing = config.model_copy(update={"adapt": config.adapt.model_copy(update={"plates": list(plates)})})
        train = TRAINED[config.watch.method]
        return train(knowing, self.base, target, granularity=granularity, unit=unit, seed=config.watch.seed)

    def _note_job(self) -> None:
        """Write the record of the watcher's job, by which its models are found and exported."""
        settings = self.config.watch
        targets = sorted({path.partition("/")[0] for path in self.tiles.plates(settings.targets)} - {*labs_of(self.source.unit)})
        record = job_record(
            self.config,
            key=self.key,
            kind="watch",
            name=f"watch, {settings.method} from {self.source.unit}, policy {settings.policy}",
            command=self.command,
            pairs=[(self.source.unit, target) for target in targets] or [(self.source.unit, self.source.unit)],
            transfers=[],
            stages=with_needs([self.base.classifier]),
        )
        stages = list(dict.fromkeys([*self._stages_before(), *record["stages"], *sorted(self._own)]))
        # Not whole: it never is, and nothing but the watcher itself ends its run.
        self.record = {**record, "stages": stages, "whole": False}
        write_job(self.results, self.record)

    def _stages_before(self) -> list[str]:
        """Read the stages of the same job, as a watcher before this one noted them."""
        return list((self.results.read_json(f"jobs/{self.key}.json") or {"stages": []})["stages"])

    @property
    def tiles(self) -> TileStore:
        """The tile store."""
        return TileStore.open(open_place(self.config.tiles), preparation_of(self.config))
