"""Run every source, target, method, granularity and seed of the configuration, and print the source x target matrix."""

import sys

from coda_ray.config import Config, parse_job


def main() -> int:
    """Run the job."""
    config = parse_job(Config, prog="jobs/matrix.py", description=__doc__ or "")
    from coda_ray.pipeline.matrix import requests_of
    from coda_ray.pipeline.report import run_job

    wanted = config.matrix
    for field in ("sources", "targets", "methods", "granularities", "splits", "seeds"):
        if not getattr(wanted, field):
            print(f"jobs/matrix.py: matrix.{field} is empty; name at least one in the configuration file", file=sys.stderr)
            return 2
    name = f"matrix of {len(wanted.sources)} x {len(wanted.targets)}, {', '.join(wanted.methods)}"
    return run_job(config, requests_of(config), kind="matrix", name=name)


if __name__ == "__main__":
    sys.exit(main())
