"""Joining the Ray cluster that a job was submitted to, or starting one on this machine."""

import logging
import os

import ray
from ray.data import DataContext

LOCAL_OBJECT_STORE_BYTES = 2_000_000_000


def start_ray() -> None:
    """Connect to the cluster of RAY_ADDRESS (`ray job submit` sets it), or start Ray on this machine; once per process.

    RAY_ADDRESS=auto joins a Ray that runs on this machine already.

    A local Ray has no dashboard, an object store of 2 GB, and Ray's token authentication, so that nobody else on the
    network can run code in it; RAY_AUTH_MODE, set before Ray is imported, decides otherwise.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.WARNING)
    else:
        ray.init(
            address="local", include_dashboard=False, object_store_memory=LOCAL_OBJECT_STORE_BYTES, logging_level=logging.WARNING
        )
    quieten()


def quieten() -> None:
    """Keep Ray's own chatter out of this process's log; stages and jobs tell their progress themselves."""
    DataContext.get_current().enable_progress_bars = False
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
