"""Run every source, target, method, granularity and seed of the configuration, and print the source x target matrix."""

import sys
from itertools import product

from coda_ray.config import Config, parse_job


def main() -> int:
    """Run the job."""
    config = parse_job(Config, prog="jobs/matrix.py", description=__doc__ or "")
    from coda_ray.pipeline.report import run_job
    from coda_ray.pipeline.transfer import UNADAPTED, Request

    wanted = config.matrix
    for field in ("sources", "targets", "methods", "granularities", "seeds"):
        if not getattr(wanted, field):
            print(f"jobs/matrix.py: matrix.{field} is empty; name at least one in the configuration file", file=sys.stderr)
            return 2
    cells = product(wanted.seeds, wanted.methods, wanted.granularities, wanted.sources, wanted.targets)
    requests = [Request(s, t, m, g, seed) for seed, m, g, s, t in cells if s != t]
    requests += [
        Request(s, s, UNADAPTED.get(m, m), "plate", seed)
        for seed, m, s in product(wanted.seeds, wanted.methods, wanted.sources)
    ]
    name = f"matrix of {len(wanted.sources)} x {len(wanted.targets)}, {', '.join(wanted.methods)}"
    return run_job(config, requests, kind="matrix", name=name)


if __name__ == "__main__":
    sys.exit(main())
