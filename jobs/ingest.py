"""Prepare tiles: read a JUMP-shaped bucket (or a hand-made image list), write the tile store of the configuration."""

import sys

from coda_ray.config import Config, parse_job, told_in_one_line


def main() -> int:
    """Run the job."""
    config = parse_job(Config, prog="jobs/ingest.py", description=__doc__ or "")
    from coda_ray.cluster import start_ray
    from coda_ray.jump.ingest import IngestError, run_ingest
    from coda_ray.progress import progress_bar

    with told_in_one_line("jobs/ingest.py", IngestError):
        start_ray()
        with progress_bar("ingesting", "sites") as show:
            summary = run_ingest(config, lambda now: show(now.sites_done, now.sites_total))
    print(summary.text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
