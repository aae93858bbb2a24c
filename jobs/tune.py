"""Search hyperparameters of an adaptation with Ray Tune, without labels of the target, and rank what was tried.

Section `tune` says what is searched. The same command again continues: finished trials are looked up, the others run. Ctrl-C
(or SIGTERM) stops, and shows the table of what is finished.
"""

import shlex
import sys

from coda_ray.config import Config, parse_job


def main() -> int:
    """Run the job."""
    config = parse_job(Config, prog="jobs/tune.py", description=__doc__ or "")
    from coda_ray.pipeline.report import run_tune

    return run_tune(config, shlex.join(["python", *sys.argv]))


if __name__ == "__main__":
    sys.exit(main())
