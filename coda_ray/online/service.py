"""What a person sees of a watcher: one look or many, progress, and an exit code."""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from coda_ray.cluster import start_ray
from coda_ray.config import Config, ConfigError
from coda_ray.lease import Lease, LostLeaseError
from coda_ray.online.board import AGAIN, ASIDE, DONE, journeys
from coda_ray.online.ledger import Ledger
from coda_ray.online.meter import Progress
from coda_ray.online.serving import Models, watch_folder
from coda_ray.online.watcher import Watcher
from coda_ray.pipeline.task import check_resources
from coda_ray.progress import Say
from coda_ray.storage import open_place
from coda_ray.tracking.records import WATCH_FIGURE, WATCH_TABLE
from coda_ray.tracking.runs import Tracker
from coda_ray.tracking.store import RunStore

WATCHING = "watching"
LOST = (
    "this watcher stops; start it again and it waits for the other one, with a longer watch.lease_s if storage is too slow for it"
)


def watch(config: Config, *, once: bool, command: str, say: Say, progress: Progress, again: Sequence[str] = ()) -> int:
    """Watch a bucket until it is stopped, or look once.

    Parameters
    ----------
    config
        Settings; section `watch`.
    once
        Look once, take every plate as far as it goes, and end.
    command
        The command line, for the records.
    say
        Receives lines of progress.
    progress
        Makes the progress of a title and a unit.
    again
        Plates that were set aside and are to be tried once more: names, or source/batch/plate.

    Returns
    -------
    int
        0; with `once` 1 where a plate failed, or where another watcher works and `again` was asked for.

    Raises
    ------
    ConfigError
        When the settings cannot be watched with, or no node has what `train` reserves.
    OSError
        With `once`, when storage does not answer; otherwise the next look tries again.
    StagesFailedError
        When the source's model could not be made.
    LostLeaseError, LostLedgerError
        When another watcher has taken over.
    """
    folder, by = watch_folder(config), f"{socket.gethostname()}:{os.getpid()}"
    with Lease(folder.child("lease"), by, config.watch.lease_s) as lease:
        if not lease.acquire(wait=not once, say=lambda other: say(f"{other} holds the lease; looking whether it lives")):
            if again:
                say("another watcher is at work, so --again was not done; stop that one, or start it again with --again")
                return 1
            say("another watcher is at work; nothing to do")
            return 0
        start_ray()
        check_resources(config.train, say)
        tracker = Tracker.open(config.tracking, open_place(config.results))
        # Ray takes a driver's SIGTERM for itself; here it ends the watcher as Ctrl-C does, with the lease given back.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            watcher = _begin(config, lease, by, tracker, command, say, progress)
            _try_again(watcher, again)
            if not once:
                _look_for_ever(watcher, say)
            watcher.look()
            say(_summary(watcher))
            tracker.finish_job(watcher.models.record)
            return int(watcher.failed > 0)
        except LostLeaseError as error:
            raise LostLeaseError(f"{error}; {LOST}") from error
        finally:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
            tracker.close()


def _begin(config: Config, lease: Lease, by: str, tracker: Tracker, command: str, say: Say, progress: Progress) -> Watcher:
    """Open the ledger, and make what all plates need."""
    try:
        models = Models(config, command, tracker, say)
        ledger = Ledger.open(watch_folder(config).child("ledger"), models.identity, by)
        if lease.took_over:
            # An entry of our own keeps the one who slept through its lease from writing another.
            ledger.claim(WATCHING, term=lease.term)
        if config.watch.register_as and RunStore.open(config.tracking, open_place(config.results)) is None:
            raise ConfigError("watch.register_as is set, but nothing is sent to MLflow; set MLFLOW_TRACKING_URI, or unset it")
        models.begin()
        watcher = Watcher(config, models, ledger, lease, tracker, say, progress)
        if config.watch.policy == "nearest":
            watcher.meter.require()
    except FileNotFoundError as error:  # tiles of the source that are not there
        raise ConfigError(str(error)) from error
    return watcher


def _try_again(watcher: Watcher, names: Sequence[str]) -> None:
    """Take plates that were set aside up again; of one that was not this is told, because the same command may be started twice.

    Raises
    ------
    ConfigError
        When no plate of that name has arrived, or several have.
    """
    for name in names:
        found = journeys(watcher.ledger.entries)
        named = [journey for plate, journey in found.items() if name in (plate.plate, "/".join(plate))]
        if len(named) > 1:
            several = ", ".join("/".join(journey.plate) for journey in named)
            raise ConfigError(f"again = {name!r}: several plates have that name; give one of {several}")
        if not named:
            aside = ", ".join("/".join(plate) for plate, journey in found.items() if journey.state == ASIDE) or "none"
            raise ConfigError(f"again = {name!r}: no such plate has arrived; these were set aside: {aside}")
        (journey,) = named
        if journey.state != ASIDE:
            watcher.say(f"{'/'.join(journey.plate)}: is not set aside but {journey.state}; it goes on from there")
            continue
        watcher.lease.check()
        watcher.ledger.append(journey.plate, AGAIN)


def _look_for_ever(watcher: Watcher, say: Say, wait: Callable[[float], None] = time.sleep) -> NoReturn:
    """Look again and again, until somebody stops it; what storage does not answer now it may answer later."""
    try:
        while True:
            try:
                if watcher.look():
                    say(_summary(watcher))
            except OSError as error:
                say(f"{error}; looking again in {watcher.settings.poll_s:g} s")
            wait(watcher.settings.poll_s)
    except KeyboardInterrupt:
        watcher.tracker.finish_job(watcher.models.record)
        raise


def _summary(watcher: Watcher) -> str:
    """Sum up the ledger."""
    found = [journey.state for journey in journeys(watcher.ledger.entries).values()]
    ended = {state: found.count(state) for state in (DONE, ASIDE)}
    waiting = len(found) - sum(ended.values())
    files = ", ".join(watcher.folder.address(name) for name in (WATCH_TABLE, WATCH_FIGURE)) if found else "nothing yet"
    return f"{len(found)} plates: {ended[DONE]} reported, {ended[ASIDE]} set aside, {waiting} on their way; {files}"


def say_line(line: str) -> None:
    """Print a line of progress at once."""
    print(line, file=sys.stdout, flush=True)
