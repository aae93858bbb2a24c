"""Run every source, target, method, granularity and seed of the configuration, and print the source x target matrix."""

import sys

from coda_ray.config import Config, parse_job, told_in_one_line


def main() -> int:
    """Run the job."""
    config = parse_job(Config, prog="jobs/matrix.py", description=__doc__ or "")
    from coda_ray.pipeline.matrix import requests_of
    from coda_ray.pipeline.report import run_job

    with told_in_one_line("jobs/matrix.py"):
        requests = requests_of(config)
    wanted = config.matrix
    name = f"matrix of {len(wanted.sources)} x {len(wanted.targets)}, {', '.join(wanted.methods)}"
    return run_job(config, requests, kind="matrix", name=name)


if __name__ == "__main__":
    sys.exit(main())
