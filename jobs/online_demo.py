"""Plates that arrive one by one, watched twice: undisturbed, and by a watcher that is killed and started again.

A simulated microscope uploads plates to a real S3 server on loopback; one has broken images. The watcher prepares, compares,
adapts and predicts. In the end both ledgers and all predictions must be equal. Everything lands in `online-demo/`, made anew.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from coda_ray.config import Section, parse_job, told_in_one_line
from coda_ray.jump.simulate.defects import spoil_file
from coda_ray.jump.simulate.layout import Plate, draw_plates
from coda_ray.jump.simulate.settings import PRESETS, SimulateSettings

ROOT = Path("online-demo")
SOURCE, TARGET, BUCKET = "sim_a", "sim_b", "cellpainting-gallery"
# The second plate of the target has truncated images.
BROKEN = 1
# The watcher is killed when it has noted these (number of the plate, state): in an adaptation, and between predictions.
KILLS = ((0, "chosen"), (0, "predicted"))
# Facts that name a place, or how far an ingest had come when it stopped.
PASSING = ("folder", "reason")
PATIENCE_S, POLL_S = 1800.0, 0.2
# What the simulated microscope takes for a plate, beside its upload.
PACE_S = 5.0


class OnlineDemoJob(Section):
    """Configuration of jobs/online_demo.py; configs/watch.yaml holds the rest."""

    seed: int = Field(0, ge=0)
    """Seed of the simulated world."""


def main() -> int:
    """Run the job."""
    job = parse_job(OnlineDemoJob, prog="jobs/online_demo.py", description=__doc__ or "")
    settings = PRESETS["demo"].model_copy(update={"seed": job.seed, "sources": [SOURCE, TARGET], "batches_per_source": 3})
    with told_in_one_line("jobs/online_demo.py", RuntimeError):
        return _run(settings)


def _run(settings: SimulateSettings) -> int:
    """Watch twice, and compare."""
    shutil.rmtree(ROOT, ignore_errors=True)
    from coda_ray.cluster import start_ray
    from coda_ray.config import Place
    from coda_ray.jump.simulate.bucket import write_bucket
    from coda_ray.jump.simulate.serve import own_keys
    from coda_ray.progress import progress_bar

    key = own_keys()
    start_ray()
    gallery = ROOT / "gallery"
    with progress_bar("simulating", "sites") as progress:
        print(write_bucket(settings, Place(address=str(gallery)), progress), flush=True)
    plates = [plate for plate in draw_plates(settings) if plate.source == TARGET]
    _prepare(gallery, key)
    runs = {name: Run(name, key, gallery, plates) for name in ("undisturbed", "killed")}
    runs["undisturbed"].watch(kills=())
    runs["killed"].watch(kills=KILLS)
    return _compare(*runs.values())


def _prepare(gallery: Path, key: tuple[str, str]) -> None:
    """Ingest the source and train its model, once for both runs."""
    _stock(gallery, ROOT / "base")
    with _served(ROOT / "base", key) as places:
        _job("ingest.py", *places, "--ingest.sources", SOURCE)
        _job("watch.py", *places, "--once")


def _stock(gallery: Path, root: Path) -> None:
    """Lay out a bucket that has the source and the tables, and not yet a plate of the target."""
    bucket = root / "bucket" / BUCKET

    def without_target(folder: str, names: Sequence[str]) -> list[str]:
        return [name for name in names if name == TARGET]

    shutil.copytree(gallery, bucket, ignore=without_target, copy_function=os.link)


@contextmanager
def _served(root: Path, key: tuple[str, str]) -> Iterator[list[str]]:
    """Serve a bucket by S3; give the options that name it, the tiles and the results."""
    from coda_ray.jump.simulate.serve import serve_folder

    with serve_folder(root / "bucket", key=key) as url:
        options = ["--config", "configs/watch.yaml"]
        for section, address in (("bucket", f"s3://{BUCKET}"), ("metadata", f"s3://{BUCKET}/metadata")):
            options += [f"--{section}.address", address, f"--{section}.endpoint-url", url]
        for section in ("tiles", "results"):
            options += [f"--{section}.address", str(root / section)]
        yield options


def _job(name: str, *options: str) -> None:
    """Run a job to its end.

    Raises
    ------
    RuntimeError
        When it fails.
    """
    if code := _start(name, *options).wait():
        raise RuntimeError(f"jobs/{name} ended with {code}")


def _start(name: str, *options: str) -> "subprocess.Popen[bytes]":
    """Start a job on the Ray of this process."""
    import ray

    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, str(Path(__file__).with_name(name)), *options]
    return subprocess.Popen(command, env=environment)  # noqa: S603 (our own arguments, no shell)


class Run:
    """One run of the watcher over plates that arrive.

    Parameters
    ----------
    name
        Its folder.
    key
        Keys of its S3 server.
    gallery
        Where the microscope takes its plates from.
    plates
        In the order in which they arrive.
    """

    def __init__(self, name: str, key: tuple[str, str], gallery: Path, plates: Sequence[Plate]) -> None:
        self.name, self.root, self.key, self.gallery, self.plates = name, ROOT / name, key, gallery, plates
        self.results = self.root / "results"

    def watch(self, kills: Sequence[tuple[int, str]]) -> None:
        """Let plates arrive, watch until all have ended, and kill the watcher at some points on the way."""
        _stock(self.gallery, self.root)
        for part in ("tiles", "results"):
            shutil.copytree(ROOT / "base" / part, self.root / part, ignore=shutil.ignore_patterns("watch", "mlflow*"))
        with _served(self.root, self.key) as options:
            microscope = threading.Thread(target=self._deliver, args=(options[options.index("--bucket.endpoint-url") + 1],))
            microscope.start()
            try:
                for number, state in kills:
                    watcher = _start("watch.py", *options)
                    self._wait(watcher, partial(self._has_come, number, state), kill=True)
                    print(f"=== {self.name}: killed when plate {number + 1} was {state} ===", flush=True)
                watcher = _start("watch.py", *options)
                self._wait(watcher, self._all_have_ended, kill=False)
            finally:
                microscope.join()

    def entries(self) -> list[dict[str, Any]]:
        """Read the ledger."""
        files = sorted((self.results / "watch" / "ledger").glob("*.json"))
        return [json.loads(file.read_text(encoding="utf-8")) for file in files]

    def courses(self) -> dict[str, list[tuple[str, dict[str, Any]]]]:
        """Give what the ledger says of each plate, without places and times."""
        found: dict[str, list[tuple[str, dict[str, Any]]]] = {}
        for entry in self.entries():
            if entry["plate"]:
                facts = {name: value for name, value in entry["facts"].items() if name not in PASSING}
                found.setdefault("/".join(entry["plate"]), []).append((entry["state"], facts))
        return found

    def _deliver(self, url: str) -> None:
        """Upload one plate after the other."""
        from coda_ray.config import Place
        from coda_ray.jump.simulate.deliver import deliver_plate
        from coda_ray.storage import open_place

        bucket = open_place(Place(address=f"s3://{BUCKET}", endpoint_url=url))
        for number, plate in enumerate(self.plates):
            spoil = {"spoil": partial(spoil_file, kind="truncated")} if number == BROKEN else {}
            deliver_plate(open_place(Place(address=str(self.gallery))), bucket, plate, **spoil)
            print(f"=== {self.name}: plate {number + 1}, {plate.name}, has arrived ===", flush=True)
            time.sleep(PACE_S)

    def _wait(self, watcher: "subprocess.Popen[bytes]", there: Callable[[], bool], *, kill: bool) -> None:
        """Wait until the ledger says so; then kill the watcher, or let it end in order."""
        end = time.monotonic() + PATIENCE_S
        while not there():
            if watcher.poll() is not None or time.monotonic() > end:
                watcher.kill()
                raise RuntimeError(f"{self.name}: the watcher ended early ({watcher.wait()}), or went on for too long")
            time.sleep(POLL_S)
        watcher.kill() if kill else watcher.terminate()
        watcher.wait()

    def _has_come(self, number: int, wanted: str) -> bool:
        """Whether a plate has come to a state."""
        said = self.courses().get("/".join((TARGET, self.plates[number].batch, self.plates[number].name)), [])
        return any(state == wanted for state, _ in said)

    def _all_have_ended(self) -> bool:
        """Whether the watcher's table shows every plate as reported or set aside."""
        table = self.results / "watch" / "plates.csv"
        ended = (
            [line for line in table.read_text().splitlines() if ",reported," in line or ",aside," in line]
            if table.exists()
            else []
        )
        return len(ended) == len(self.plates)


def _compare(one: Run, other: Run) -> int:
    """Print how both runs ended and whether they are equal; 1 where they differ."""
    import pandas as pd

    for run in (one, other):
        table = pd.read_csv(run.results / "watch" / "plates.csv")
        shown = ["plate", "state", "tries", "drift_source", "nearest", "drift_nearest", "model", "confidence", "reason"]
        print(f"\n{run.name}:\n{table[shown].to_string(index=False, max_colwidth=60)}")
    ledgers = one.courses() == other.courses()
    folders = [run.results / "predictions" for run in (one, other)]
    names = [{path.relative_to(folder) for path in folder.rglob("*.parquet")} for folder in folders]
    same = names[0] == names[1] and all(_equal(folders[0] / name, folders[1] / name) for name in names[0])
    said = ["equal" if equal else "DIFFERENT" for equal in (ledgers, same)]
    print(f"\nledgers: {said[0]}; {len(names[0])} tables of predictions: {said[1]}")
    print(f"drift over time: {one.results / 'watch' / 'drift.png'}")
    print(f"MLflow:          mlflow ui --backend-store-uri sqlite:///{one.results.absolute()}/mlflow.db")
    return 0 if ledgers and same else 1


def _equal(one: Path, other: Path) -> bool:
    """Whether two tables hold the same values."""
    import pandas as pd

    return bool(pd.read_parquet(one).equals(pd.read_parquet(other)))


if __name__ == "__main__":
    sys.exit(main())
