"""Send everything in the results folder to MLflow; what is there already stays as it is."""

import sys

from rich.console import Console
from rich.progress import Progress

from coda_ray.config import Config, parse_job
from coda_ray.storage import open_place
from coda_ray.tracking.outbox import is_unreachable, one_line, without_password
from coda_ray.tracking.store import RunStore
from coda_ray.tracking.sync import sync


def main(argv: list[str] | None = None) -> int:
    """Run the job; the exit code is 1 when MLflow cannot be filled."""
    config = parse_job(Config, argv, prog="sync_mlflow.py", description=__doc__ or "")
    results = open_place(config.results)
    store = RunStore.open(config.tracking, results)
    if store is None:
        print(
            "sync_mlflow.py: nowhere to send to; set MLFLOW_TRACKING_URI and tracking.enabled",
            file=sys.stderr,
        )
        return 1
    address = without_password(store.address)
    try:
        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task(f"to {address}", total=None)
            counts = sync(results, store, lambda done, total: bar.update(task, completed=done, total=total))
    except Exception as error:
        lost = "; start the server or correct MLFLOW_TRACKING_URI, then run this again" if is_unreachable(error) else ""
        print(f"sync_mlflow.py: {address}: {type(error).__name__}: {one_line(error)}{lost}", file=sys.stderr)
        return 1
    told = f"{counts.jobs} jobs, {counts.transfers} transfers, {counts.stages} stages, {counts.trials} trials"
    print(f"{address}: {told}, {counts.courses} courses, {counts.plates} plates")
    return 0


if __name__ == "__main__":
    sys.exit(main())
