"""Compare strategies for plates that arrive one by one, in simulation: what each would have predicted then, and at what cost.

Section `online` says what is compared. Adaptations know of the plates that have arrived, and read no label; labels of the
target are read by the scores at the end. The same command again runs only what is missing.
"""

import shlex
import sys

from coda_ray.config import Config, parse_job


def main() -> int:
    """Run the job."""
    config = parse_job(Config, prog="jobs/online.py", description=__doc__ or "")
    from coda_ray.online.evaluation import run_online

    return run_online(config, shlex.join(["python", *sys.argv]))


if __name__ == "__main__":
    sys.exit(main())
