"""Watch a bucket: each new plate is prepared, checked, predicted by the model that fits it or one adapted to it, and reported.

Section `watch` says how. What was done is in a ledger: a watcher that is killed goes on where it was, and of two on one ledger
one waits for the other. No label of the plates is read.
"""

import shlex
import signal
import sys

from pydantic import Field
from pydantic_settings import CliImplicitFlag

from coda_ray.config import Config, parse_job, told_in_one_line


class WatchJob(Config):
    """Configuration of jobs/watch.py."""

    once: CliImplicitFlag[bool] = False
    """Look once, take every plate as far as it goes, and end: for cron. The exit code is 1 when a plate failed."""
    again: list[str] = Field(default_factory=list)
    """Plates that were set aside and are to be tried once more: by name, or source/batch/plate where several have that name."""


def main() -> int:
    """Run the job."""
    job = parse_job(WatchJob, prog="jobs/watch.py", description=__doc__ or "")
    # While it waits for its turn, a scheduler's SIGTERM ends it as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    from coda_ray.lease import LostLeaseError
    from coda_ray.online.ledger import LostLedgerError
    from coda_ray.online.service import say_line, watch
    from coda_ray.pipeline.matrix import StagesFailedError
    from coda_ray.pipeline.predict import PredictionError
    from coda_ray.progress import progress_bar
    from coda_ray.tiles.stream import UnreadableTilesError
    from coda_ray.training.checkpoints import DamagedFileError

    config = Config.model_validate(job.model_dump(exclude={"once", "again"}))
    # The source is embedded before the first look, and no plate's fault.
    of_source = (StagesFailedError, DamagedFileError, PredictionError, UnreadableTilesError)
    with told_in_one_line("jobs/watch.py", LostLeaseError, LostLedgerError, *of_source):
        return watch(
            config,
            once=job.once,
            command=shlex.join(["python", *sys.argv]),
            say=say_line,
            progress=progress_bar,
            again=job.again,
        )


if __name__ == "__main__":
    sys.exit(main())
