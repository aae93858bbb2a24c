"""Launching a worker loop with Ray Train: inside the calling process, or on a group of workers, elastic if asked."""

from collections.abc import Callable, Mapping
from typing import Any, cast
from uuid import uuid4

import ray.train.torch
import torch
from fsspec.implementations.local import LocalFileSystem
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from coda_ray.config import Train
from coda_ray.progress import Tell
from coda_ray.storage import Folder

Loop = Callable[[Mapping[str, Any]], dict[str, Any]]


def launch(loop: Loop, run: Any, train: Train, results: Folder, tell: Tell | None = None) -> dict[str, Any]:
    """Run a worker loop to its end.

    Parameters
    ----------
    loop
        Called on every worker with `{"run": run, "tell": tell}`.
    run
        Picklable description of the work.
    train
        Workers, resources, restarts.
    results
        Results folder; Ray Train keeps its own state under `ray/` while the loop runs.
    tell
        Receives how far rank 0 is; picklable, must not block. None where the loop prints it.

    Returns
    -------
    dict
        What rank 0's loop returned.
    """
    low, high = train.worker_range
    given = {"run": run, "tell": tell}
    if high == 0:
        # Ray Train's local mode: the same loop in this process, a tenth of a second instead of a new process tree.
        trainer = TorchTrainer(cast(Any, loop), train_loop_config=given, scaling_config=ScalingConfig(num_workers=0))
        return _returned(trainer)
    name = f"run-{uuid4().hex[:12]}"
    state = results.child("ray")
    trainer = TorchTrainer(
        cast(Any, loop),
        train_loop_config=given,
        scaling_config=ScalingConfig(
            num_workers=low if low == high else cast(Any, (low, high)),
            use_gpu=train.gpus_per_worker > 0,
            resources_per_worker=resources(train),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=state.path(),
            storage_filesystem=None if isinstance(state.fs, LocalFileSystem) else PyFileSystem(FSSpecHandler(state.fs)),
            failure_config=FailureConfig(max_failures=train.max_failures),
        ),
    )
    try:
        return _returned(trainer)
    finally:
        state.delete(name)


def _returned(trainer: TorchTrainer) -> dict[str, Any]:
    """Run a trainer; take what rank 0's loop returned."""
    result = cast(Any, trainer.fit())
    return dict(result.return_value)


def device_of(train: Train) -> torch.device:
    """Give the device of the calling worker: the GPU that it reserved, or the CPU.

    A task that reserved no GPU sees all of its node (`start_ray` leaves them visible), and Ray Train would name the first; but a
    stage that asked for none must not fill the memory of a GPU that another one counts on.

    Parameters
    ----------
    train
        Resources of the worker.

    Returns
    -------
    torch.device
        `cpu` where `train.gpus_per_worker` is 0.
    """
    return ray.train.torch.get_device() if train.gpus_per_worker else torch.device("cpu")


def resources(train: Train) -> dict[str, float]:
    """What one worker reserves."""
    wanted = {"CPU": train.cpus_per_worker}
    return wanted | ({"GPU": train.gpus_per_worker} if train.gpus_per_worker else {})
