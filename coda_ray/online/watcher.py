"""The watcher: every plate that arrives is prepared, checked, compared, predicted with the model that fits it, and reported.

    arrived ─ ingest ─► ingested ─ check ─► checked ─ choose ─► chosen ─ adapt, predict ─► predicted ─ report ─► reported
       └────────────────── a step that fails is tried again later; in the end the plate is set aside ──────────┘

The ledger is the only memory. A step is a look-up where it was done before, and its entry is written after it, so that a watcher
that is killed anywhere goes on where it was. All plates of a look go through a step before any goes through the next, and the
adaptations that they ask for run side by side.
"""

import json
import logging
import math
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import pandas as pd
from ray.exceptions import RayError

from coda_ray.analysis.drift import Controls
from coda_ray.config import Config
from coda_ray.jump.ingest import IngestError, run_ingest
from coda_ray.jump.layout import PlateName
from coda_ray.jump.tables import CONTROL, NEGATIVE_CONTROL, Tables, wells_expected
from coda_ray.learn.exported import ModelError
from coda_ray.lease import Lease, LostLeaseError
from coda_ray.online.arrivals import Arrivals, complete_batch
from coda_ray.online.board import ASIDE, DONE, FAILED, STEP_AFTER, Journey, journeys, plates_table
from coda_ray.online.ledger import Ledger, LostLedgerError
from coda_ray.online.meter import DriftMeter, Progress, plates_of, tiles_of_plate
from coda_ray.online.serving import Choice, Models, watch_folder
from coda_ray.pipeline import data
from coda_ray.pipeline.models import Export
from coda_ray.pipeline.predict import PredictionError, predict, predictions_folder
from coda_ray.progress import Say
from coda_ray.storage import open_place
from coda_ray.tiles.store import TileIndex, read_parquet
from coda_ray.tiles.stream import UnreadableTilesError
from coda_ray.tracking.figures import figure_png
from coda_ray.tracking.records import WATCH_FIGURE, WATCH_TABLE, read_record, watched_path
from coda_ray.tracking.registry import RegistryError, register
from coda_ray.tracking.runs import Tracker
from coda_ray.tracking.watch_figures import drift_figure
from coda_ray.training.checkpoints import DamagedFileError

log = logging.getLogger(__name__)
KNOWN = "known"
# Plates that are sent to MLflow again after a watcher that was killed: more than one look takes.
SENT_AGAIN = 100
# Somebody else works on the ledger: no plate's fault.
LOST = (LostLeaseError, LostLedgerError)
# What may happen to a plate; of anything else the log has the traceback.
EXPECTED = (ValueError, OSError, IngestError, PredictionError, UnreadableTilesError, ModelError, DamagedFileError, RayError)
Reached = tuple[str, dict[str, Any]]


class UnfitPlateError(ValueError):
    """A plate that no later try can mend: it is set aside at once."""


class Watcher:
    """Takes new plates to their predictions; Ray must be running.

    Parameters
    ----------
    config
        Settings; section `watch` says what.
    models
        The models; begun.
    ledger
        What was done.
    lease
        Held: nobody else works on the ledger.
    tracker
        MLflow.
    say
        Receives lines of progress.
    progress
        Makes the progress of a title and a unit, as `progress.progress_bar`.
    clock
        Unix time (s).
    """

    def __init__(
        self,
        config: Config,
        models: Models,
        ledger: Ledger,
        lease: Lease,
        tracker: Tracker,
        say: Say,
        progress: Progress,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.config, self.models, self.ledger, self.lease = config, models, ledger, lease
        self.tracker, self.say, self.progress, self.clock = tracker, say, progress, clock
        self.settings, self.folder = config.watch, watch_folder(config)
        self.arrivals = Arrivals(config, clock)
        self.meter = DriftMeter(config, models.export(models.source).model, progress)
        self.failed = 0
        # What was said of a plate or a unit last.
        self._told: dict[PlateName | Choice, str] = {}
        # Units of which a plate of this look could not be told how far it is.
        self._damaged: set[Choice] = set()
        # Entries that the table shows; what a watcher before this one left, it may not have shown.
        self._tabulated = 0
        self._note_units()
        if lease.took_over:
            self._send_again()

    def look(self) -> bool:
        """Look at the bucket once, and take every plate as far as it goes.

        Returns
        -------
        bool
            Whether anything was done.

        Raises
        ------
        OSError
            When storage does not answer.
        LostLeaseError, LostLedgerError
            When another watcher has taken over.
        """
        self.lease.check()
        self.tracker.try_again()
        self._damaged.clear()
        # An entry whose answer was lost may have been written.
        self.ledger.refresh()
        before = len(self.ledger.entries)
        self._arrive()
        self._step_all("arrived")
        data.forget()
        self._embed(self._due("ingested"))
        self._step_all("ingested")
        self._step_all("checked")
        self._adapt(self._due("chosen"))
        self._step_all("chosen")
        self._step_all("predicted")
        if len(self.ledger.entries) > self._tabulated:
            self._tabulate()
        return len(self.ledger.entries) > before

    def _arrive(self) -> None:
        """Note plates that are new."""
        try:
            arrived, waiting = self.arrivals.look(set(journeys(self.ledger.entries)))
        except ValueError as error:  # a table that is just being written
            raise OSError(f"the metadata cannot be read: {error}") from error
        for arrival in arrived:
            self._note(arrival.plate, "arrived", sites=arrival.sites, missing=arrival.missing)
        for one in waiting:
            self._tell(one.plate, "/".join(one.plate), f"waiting: {one.reason}")

    def _due(self, state: str) -> list[Journey]:
        """List the plates in a state that may be tried now, in the order of arrival."""
        found, now = journeys(self.ledger.entries).values(), self.clock()
        return [journey for journey in found if journey.state == state and journey.is_due(now, self.settings.retry_after_s)]

    def _step_all(self, state: str) -> None:
        """Take all plates of a state one step on."""
        for journey in self._due(state):
            step = STEP_AFTER[state]
            try:
                reached: Reached | None = getattr(self, f"_{step}")(journey)
            except LOST:
                raise
            except Exception as error:
                self._fail(journey, step, error)
                continue
            if reached:
                self._note(journey.plate, reached[0], **reached[1])

    def _note(self, plate: PlateName, state: str, **facts: Any) -> None:
        """Write an entry; the lease is looked at first."""
        self.lease.check()
        self.ledger.append(plate, state, **facts)
        told = ", ".join(f"{name} {_short(value)}" for name, value in facts.items() if isinstance(value, int | float | str))
        self.say(f"{'/'.join(plate)}: {state}{f': {told}' if told else ''}")

    def _tell(self, about: PlateName | Choice, name: str, text: str) -> None:
        """Say something of a plate or a unit, once."""
        if self._told.get(about) != text:
            self.say(f"{name}: {text}")
            self._told[about] = text

    def _fail(self, journey: Journey, step: str, error: Exception) -> None:
        """Note a failed try, and set the plate aside after the last.

        Raises
        ------
        OSError
            When storage does not answer at all: that is no plate's fault.
        """
        self._make_sure_that_storage_answers(error)
        self.failed += 1
        if not isinstance(error, EXPECTED):
            log.error("%s: %s failed", "/".join(journey.plate), step, exc_info=error)
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        self._note(journey.plate, FAILED, step=step, reason=reason)
        if isinstance(error, UnfitPlateError) or len(journey.failures) + 1 >= self.settings.tries:
            self._note(journey.plate, ASIDE, reason=reason)

    # The steps: each gives the state that is reached and what is noted, or nothing where the plate has to wait.

    def _ingest(self, journey: Journey) -> Reached:
        """Prepare the tiles of a plate."""
        plate = journey.plate
        wanted = self.config.ingest.model_copy(update={"sources": [plate.source], "plates": [plate.plate]})
        config = self.config.model_copy(update={"ingest": wanted})
        with self.progress(f"ingesting {plate.plate}", "sites") as show:
            done = run_ingest(config, lambda now: show(now.sites_done, now.sites_total))
        try:
            note = json.loads(self.models.tiles.folder.read(f"{'/'.join(plate)}/plate.json"))
        except FileNotFoundError:
            raise IngestError("; ".join(done.notes) or "its tiles were not written") from None
        return "ingested", {"tiles": note["tiles"], "quarantined": note["quarantined"]}

    def _check(self, journey: Journey) -> Reached:
        """Judge the tiles of a plate, and measure how far its controls are from the source's."""
        index = tiles_of_plate(self.config, journey.plate)
        wells, expected = set(index.frame["Metadata_Well"]), set(wells_expected(journey.plate, self._metadata()))
        if not wells or len(wells & expected) < self.settings.min_wells * len(expected):
            raise UnfitPlateError(
                f"{len(wells)} of {len(expected)} wells have a tile, less than watch.min_wells = {self.settings.min_wells}; "
                "quarantine.parquet of the plate says why"
            )
        side, crop = index.smallest_side, self.meter.model.tile_crop
        if side < crop:
            raise UnfitPlateError(f"tiles of {side} px are smaller than the model's crop of {crop} px")
        self.meter.embed([index], f"embedding {journey.plate.plate}")
        try:
            own = self.meter.controls([journey.plate])
        except ValueError as error:
            raise UnfitPlateError(f"its DMSO images cannot be compared: {error}") from error
        reference = self.meter.reference
        drift = None if own is None or reference is None else round(reference.drift(own), 4)
        images = int((index.frame[CONTROL] == NEGATIVE_CONTROL).sum())
        return "checked", {"wells": len(wells), "expected": len(expected), "controls": images, "drift_source": drift}

    def _choose(self, journey: Journey) -> Reached | None:
        """Choose the model of a plate, by the policy."""
        policy, threshold = self.settings.policy, self.meter.threshold
        near, distances = self._nearest(journey)
        distance = min(distances.values(), default=None)
        facts: dict[str, Any] = {"nearest": near.text, "drift_nearest": distance, "threshold": threshold, "distances": distances}
        if policy == "batch":
            choice, why = self._batch_model(journey), "its batch is complete"
            if choice is None:
                return None
        elif policy == "plate":
            choice, why = self._plate_model(journey), "policy plate"
        elif distance is None or threshold is None:
            choice, why = near, "its drift cannot be measured"
        elif distance > threshold:
            choice, why = self._plate_model(journey), "further than the threshold from all that is known"
        else:
            choice, why = near, "nearest"
        return "chosen", {"model": choice.text, "why": why, **facts, **choice.facts}

    def _predict(self, journey: Journey) -> Reached:
        """Predict a plate with its model, and register the model where that is wanted."""
        choice = Choice.of(journey.facts["chosen"])
        export = self.models.export(choice)
        with self.progress(f"predicting {journey.plate.plate}", "tiles") as show:
            predict(self.config, export.model, tiles_of_plate(self.config, journey.plate), show)
        folder = predictions_folder(self.config, export.model.key).child("/".join(journey.plate))
        wells, note = read_parquet(folder, "wells.parquet").to_pandas(), json.loads(folder.read("plate.json"))
        facts = {
            "model_key": export.model.key,
            "folder": folder.address(),
            "images": note["images"],
            "unreadable": note["unreadable"],
            "confidence": _mean(wells["confidence"]),
            "replicate_agreement": _mean(wells["replicate_agreement"]),
        }
        if self.settings.register_as:
            facts["version"] = self._register(export, choice)
        return "predicted", facts

    def _register(self, export: Export, choice: Choice) -> str | None:
        """Register a model; predictions do not wait for an MLflow that does not answer."""
        name, origin = self.settings.register_as or "", export.model.description["origin"]
        try:
            return register(self.config, name, export.files, export.model.key, origin).address
        except RegistryError as error:
            stage, classifier = choice.stage, self.models.base.classifier.path
            by_hand = f"jobs/export.py {self._results_options()} --register {name} --stage {stage} --classifier {classifier}"
            self.say(f"{error}; the plate goes on without, and {by_hand} does it later")
            return None

    def _results_options(self) -> str:
        """Give the options by which another job finds these results: the configuration's file, and where they are."""
        words = [part for word in shlex.split(self.models.command) for part in word.split("=", 1)]
        file = next((file for word, file in pairwise(words) if word == "--config"), "FILE")
        place = self.config.results.model_dump(exclude_defaults=True)
        options = [("--config", file), *((f"--results.{name.replace('_', '-')}", str(value)) for name, value in place.items())]
        return " ".join(f"{option} {shlex.quote(value)}" for option, value in options)

    def _report(self, journey: Journey) -> Reached:
        """Keep the record of a plate, and send it with its picture to MLflow."""
        record = {
            "key": f"{self.models.key} {'/'.join(journey.plate)}",
            "job": self.models.key,
            "number": list(journeys(self.ledger.entries)).index(journey.plate) + 1,
            **journey.plate._asdict(),
            **journey.known,
            "tries": len(journey.failures) + 1,
            "adaptation_seconds": self.models.seconds(Choice.of(journey.facts["chosen"])),
        }
        path = watched_path(self.models.key, journey.plate)
        self.models.results.write(path, json.dumps(record, indent=1).encode())
        self._send(journey, record)
        return DONE, {}

    def _send(self, journey: Journey, record: Mapping[str, Any]) -> None:
        """Hand a plate to MLflow; what is sent when is the tracker's matter."""
        predictions = predictions_folder(self.config, journey.facts["predicted"]["model_key"])
        self.tracker.plate(record, predictions.read(f"{'/'.join(journey.plate)}/plate.png"))

    def _send_again(self) -> None:
        """Hand over what a watcher that was killed had reported and may not have sent; MLflow keeps each plate once."""
        reported = [journey for journey in journeys(self.ledger.entries).values() if journey.state == DONE]
        for journey in reported[-SENT_AGAIN:]:
            try:
                self._send(journey, read_record(self.models.results, watched_path(self.models.key, journey.plate)))
            except FileNotFoundError as error:  # somebody tidied up
                log.warning("%s: is not sent to MLflow again: %s is gone", "/".join(journey.plate), error)

    # What all plates of a look share.

    def _embed(self, due: Sequence[Journey]) -> None:
        """Embed plates in one go, before they are checked one by one, which tells of which one an error speaks."""
        try:
            indices = [tiles_of_plate(self.config, journey.plate) for journey in due]
            if indices:
                self.meter.embed(indices, f"embedding {len(indices)} plates")
        except Exception as error:
            if len(due) > 1:
                self.say(f"plates are embedded one by one, because together: {error}")

    def _adapt(self, due: Sequence[Journey]) -> None:
        """Train the models that plates wait for, side by side; a plate whose model failed chooses anew, later."""
        failures = self.models.make([Choice.of(journey.facts["chosen"]) for journey in due])
        for journey in due:
            if reason := failures.get(journey.facts["chosen"]["stage"]):
                self._fail(journey, "adapt", RuntimeError(reason))

    def _tabulate(self) -> None:
        """Write the table of all plates and the picture of their drift."""
        table = plates_table(journeys(self.ledger.entries).values())
        content, self._tabulated = table.to_csv(index=False).encode(), len(self.ledger.entries)
        if table.empty or (self.folder.exists(WATCH_TABLE) and self.folder.read(WATCH_TABLE) == content):
            return
        files = {WATCH_FIGURE: figure_png(drift_figure(table)), WATCH_TABLE: content}
        for name, content in files.items():
            self.folder.write(name, content)
        self.tracker.watched(table, files)

    # Models, and what they may know.

    def _plate_model(self, journey: Journey) -> Choice:
        """Plan an adaptation to a plate, by the plates that came before it."""
        plate = journey.plate
        return self.models.adapted_to(plate.source, "plate", plate.plate, self._known_until(plate.source, journey.number))

    def _batch_model(self, journey: Journey) -> Choice | None:
        """Plan an adaptation to a plate's batch, once all its plates are there or set aside."""
        plate, found = journey.plate, journeys(self.ledger.entries)
        batch = complete_batch(self._metadata(), plate.source, plate.batch, self.config.ingest.plate_types)
        missing = [name.plate for name in batch if name not in found or found[name].state in ("arrived", "ingested")]
        if missing:
            lacking = f"its batch lacks {len(missing)} of {len(batch)} plates: {', '.join(missing[:5])}"
            self._tell(plate, "/".join(plate), f"waiting: {lacking}")
            return None
        last = max(found[name].number for name in batch if found[name].state != ASIDE)
        return self.models.adapted_to(plate.source, "batch", plate.batch, self._known_until(plate.source, last))

    def _known_until(self, source: str, number: int) -> list[str]:
        """Name the plates of a source that came until then and have tiles."""
        found = journeys(self.ledger.entries).values()
        known = [journey for journey in found if journey.number <= number and journey.plate.source == source]
        return [journey.plate.plate for journey in known if journey.state not in ("arrived", "ingested", ASIDE)]

    def _nearest(self, journey: Journey) -> tuple[Choice, dict[str, float]]:
        """Find the model whose unit a plate's controls are least distant from, and how far each unit is, by its text."""
        own, reference = self.meter.controls([journey.plate]), self.meter.reference
        if own is None or reference is None:
            return self.models.source, {}
        known = [(self.models.source, reference.source), *self._units(journey)]
        number, found = reference.nearest(own, [controls for _, controls in known])
        distances: dict[str, float] = {}
        for (choice, _), far in zip(known, found, strict=True):
            # Several models of one unit may know of different plates.
            distances[choice.text] = min(round(far, 4), distances.get(choice.text, math.inf))
        return known[number][0], distances

    def _units(self, journey: Journey) -> Iterator[tuple[Choice, Controls]]:
        """Give the units adapted to, by other jobs and for plates that came before this one, with their controls."""
        by_others = [Choice.of(facts) for entry in self.ledger.entries if entry.state == KNOWN for facts in entry.facts["units"]]
        found = journeys(self.ledger.entries).values()
        earlier = [other for other in found if other.number < journey.number and "chosen" in other.facts]
        own = [Choice.of(other.facts["chosen"]) for other in earlier if other.state not in ("checked", ASIDE)]
        known = dict.fromkeys([*by_others, *(choice for choice in own if choice.plates)])
        for choice in filter(self.models.has, known):
            controls = None if choice in self._damaged else self._controls_of(choice)
            if controls is not None:
                yield choice, controls

    def _controls_of(self, choice: Choice) -> Controls | None:
        """Describe the controls of a unit; None where they are too few, or cannot be read: no new plate's fault."""
        try:
            return self.meter.controls(self._plates_of(choice))
        except Exception as error:
            self._make_sure_that_storage_answers(error)
            self._damaged.add(choice)
            self._tell(choice, choice.text, f"is passed over, because its tiles or features cannot be read: {error}")
            return None

    def _plates_of(self, choice: Choice) -> list[PlateName]:
        """List the plates of a unit that are in the tile store, embedded."""
        index = self._tiles_of_unit(choice)
        if index is None:
            return []
        if not choice.plates:
            self.meter.embed([index], f"embedding {choice.text}")
        return plates_of(index)

    def _tiles_of_unit(self, choice: Choice) -> TileIndex | None:
        """Load the tiles of a unit, as far as its adaptation knew of them; None where there are none."""
        try:
            index = data.stored_tiles(self.config, choice.target).without_labels().unit(choice.granularity, choice.unit)
        except FileNotFoundError:
            return None
        known = index.where(index.frame["Metadata_Plate"].isin(choice.plates)) if choice.plates else index
        return known if len(known) else None

    def _note_units(self) -> None:
        """Note the units that other jobs adapted to meanwhile."""
        noted = {facts["stage"] for entry in self.ledger.entries if entry.state == KNOWN for facts in entry.facts["units"]}
        fresh = [choice.facts for choice in self.models.of_others() if choice.stage not in noted]
        if fresh:
            self.lease.check()
            self.ledger.append(None, KNOWN, units=fresh)

    def _metadata(self) -> Tables:
        """Read the metadata tables, which grow.

        Raises
        ------
        OSError
            When they cannot be read: somebody may be writing one.
        """
        try:
            return self.arrivals.tables()
        except ValueError as error:
            raise OSError(f"the metadata cannot be read: {error}") from error

    def _make_sure_that_storage_answers(self, error: Exception) -> None:
        """Ask bucket, tiles and results for something that they have.

        Raises
        ------
        OSError
            When one of them does not answer or has nothing, or the metadata cannot be read: then the error is no plate's.
        """
        for name in ("bucket", "tiles", "results"):
            place = open_place(getattr(self.config, name))
            try:
                there = place.names()
            except OSError as outage:
                raise OSError(f"{error}; storage does not answer: {outage}") from error
            if not there:
                gone = f"{place.address()}: nothing is there any more; mount it, or correct {name}.address"
                raise OSError(f"{error}; {gone}") from error
        self._metadata()


def _mean(values: "pd.Series[float]") -> float | None:
    """Average what is known; None where nothing is."""
    known = values.dropna()
    return round(float(known.mean()), 4) if len(known) else None


def _short(value: float | str) -> str:
    """Spell a value for people."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
