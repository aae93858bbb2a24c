"""The whole way in minutes: simulate three labs, serve them by S3, ingest, train, adapt, compare.

Everything lands in `demo/`; a second run does only what is missing.
"""

import os
import secrets
import sys
from pathlib import Path

from coda_ray.config import Config, Section, build_config, parse_job

ROOT = Path("demo")


class DemoJob(Section):
    """Configuration of jobs/demo.py; configs/demo.yaml holds the rest."""

    seed: int = 0
    """Seed of the simulated world."""


def main() -> int:
    """Run the job."""
    job = parse_job(DemoJob, prog="jobs/demo.py", description=__doc__ or "")
    from coda_ray.jump.simulate.serve import serve_folder

    gallery, lab = ROOT / "bucket", ROOT / "lab"
    # One public bucket, read only, and one that asks for keys, as a laboratory has them.
    key = os.environ.setdefault("AWS_ACCESS_KEY_ID", secrets.token_hex(10))
    secret = os.environ.setdefault("AWS_SECRET_ACCESS_KEY", secrets.token_hex(20))
    from coda_ray.cluster import start_ray

    start_ray()
    _simulate(gallery / "cellpainting-gallery", job.seed)
    (lab / "tiles").mkdir(parents=True, exist_ok=True)
    with serve_folder(gallery, read_only=True) as public, serve_folder(lab, key=(key, secret)) as private:
        print(f"S3 on loopback: images at {public} (anonymous), tiles at {private} (with keys)", flush=True)
        bucket = "s3://cellpainting-gallery"
        overrides = {
            "--bucket.address": bucket,
            "--bucket.anonymous": "true",
            "--bucket.endpoint-url": public,
            "--metadata.address": f"{bucket}/metadata",
            "--metadata.anonymous": "true",
            "--metadata.endpoint-url": public,
            "--tiles.address": "s3://tiles",
            "--tiles.endpoint-url": private,
            "--stream.cache": str((ROOT / "cache").resolve()),
        }
        config = build_config(Config, "configs/demo.yaml", [part for pair in overrides.items() for part in pair])
        return _ingest(config) or _matrix(config)


def _simulate(bucket: Path, seed: int) -> None:
    """Write the bucket, unless it is there already."""
    from coda_ray.config import Place
    from coda_ray.jump.simulate.bucket import write_bucket
    from coda_ray.jump.simulate.settings import PRESETS
    from coda_ray.progress import progress_bar

    if (bucket / "simulation.json").exists():
        print(f"simulated bucket: {bucket} is there", flush=True)
        return
    settings = PRESETS["demo"].model_copy(update={"seed": seed})
    with progress_bar("simulating", "sites") as progress:
        print(write_bucket(settings, Place(address=str(bucket)), progress), flush=True)


def _ingest(config: Config) -> int:
    """Prepare the tiles."""
    from coda_ray.jump.ingest import run_ingest
    from coda_ray.progress import progress_bar

    with progress_bar("ingesting", "sites") as show:
        summary = run_ingest(config, lambda now: show(now.sites_done, now.sites_total))
    print(summary.text(), flush=True)
    return 0


def _matrix(config: Config) -> int:
    """Train, adapt, score, log."""
    from coda_ray.pipeline.matrix import requests_of
    from coda_ray.pipeline.report import run_job

    return run_job(config, requests_of(config.matrix), kind="matrix", name="demo")


if __name__ == "__main__":
    sys.exit(main())
