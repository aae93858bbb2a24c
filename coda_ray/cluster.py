"""Joining the Ray cluster that a job was submitted to, or starting one on this machine."""

import logging
import os
from typing import Any

import ray
from ray.data import DataContext

LOCAL_OBJECT_STORE_BYTES = 2_000_000_000
LOCAL_STARTS = 3
# Read by every process that hands out tasks: how often a task that was killed for want of memory is tried again. Ray's own
# answer is for ever, and a stage that needs more memory than there is would never end.
OOM_RETRIES = ("RAY_task_oom_retries", "3")

log = logging.getLogger(__name__)


def start_ray() -> None:
    """Connect to the cluster of RAY_ADDRESS (`ray job submit` sets it), or start Ray on this machine; once per process.

    RAY_ADDRESS=auto joins a Ray that runs on this machine already.

    A local Ray has no dashboard, an object store of 2 GB, and Ray's token authentication, so that nobody else on the
    network can run code in it; RAY_AUTH_MODE, set before Ray is imported, decides otherwise.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault(*OOM_RETRIES)
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.WARNING)
    else:
        start_local(object_store_memory=LOCAL_OBJECT_STORE_BYTES, logging_level=logging.WARNING)
    quieten()


def start_local(**options: Any) -> None:
    """Start Ray on this machine, again if it is too busy for the first try.

    Ray's node gives up when its agent needs more than 15 s to start (https://github.com/ray-project/ray/issues/65983); the
    next start finds its files in memory.

    Parameters
    ----------
    **options
        Of `ray.init`.

    Raises
    ------
    RuntimeError
        When it did not start in `LOCAL_STARTS` tries.
    """
    for left in reversed(range(LOCAL_STARTS)):
        try:
            ray.init(address="local", include_dashboard=False, **options)
            return
        except Exception as error:
            # Ray raises the bare class.
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()
            if not left:
                raise RuntimeError(
                    f"Ray did not start on this machine in {LOCAL_STARTS} tries; stop what else runs, or submit to a cluster"
                ) from error
            log.warning("Ray did not start in time, because this machine is busy; trying again")


def quieten() -> None:
    """Keep Ray's own chatter out of this process's log; stages and jobs tell their progress themselves."""
    DataContext.get_current().enable_progress_bars = False
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
