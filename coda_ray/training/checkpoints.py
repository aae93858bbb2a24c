"""Checkpoints: safetensors and JSON with a hash, written whole or not at all; nothing is unpickled."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import safetensors.torch
import torch
from torch import Tensor

from coda_ray.storage import Folder

log = logging.getLogger(__name__)
KEEP = 2
# Folder of a stage's checkpoints.
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Checkpoint:
    """A training state.

    Parameters
    ----------
    step
        Steps that were finished.
    tensors
        Model and optimizer.
    facts
        Whatever else a resumed run needs; JSON.
    """

    step: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class DamagedFileError(RuntimeError):
    """A stored file does not have the hash that was written beside it."""


def write_tensors(folder: Folder, relative: str, tensors: Mapping[str, Tensor]) -> str:
    """Write named tensors as one safetensors file.

    Returns
    -------
    str
        SHA-256 of the file.
    """
    data = safetensors.torch.save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})
    folder.write(relative, data)
    return hashlib.sha256(data).hexdigest()


def write_result(folder: Folder, name: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Write the tensors that a stage ends with, under a name that no other attempt at the stage has.

    Parameters
    ----------
    folder
        Folder of the stage.
    name
        What the name begins and ends with: `model.safetensors` gives `model-1f0c52b8.safetensors`.
    tensors
        The result.

    Returns
    -------
    dict
        What its facts must hold to read it: `file` and `sha256`.
    """
    stem, dot, ending = name.partition(".")
    file = f"{stem}-{uuid4().hex[:8]}{dot}{ending}"
    return {"file": file, "sha256": write_tensors(folder, file, tensors)}


def read_tensors(folder: Folder, relative: str, sha256: str) -> dict[str, Tensor]:
    """Read named tensors, on the CPU.

    Raises
    ------
    DamagedFileError
        When the file's hash is not `sha256`.
    """
    data = folder.read(relative)
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise DamagedFileError(
            f"{folder.address(relative)}: SHA-256 is {found[:12]}..., expected {sha256[:12]}...; "
            "the file was changed or cut short; delete its folder to compute it again"
        )
    return safetensors.torch.load(data)


def save(folder: Folder, checkpoint: Checkpoint) -> None:
    """Write a checkpoint and delete all but the newest two.

    Parameters
    ----------
    folder
        Folder of the stage.
    checkpoint
        The state.
    """
    name = f"{CHECKPOINTS}/step-{checkpoint.step:08d}"
    sha256 = write_tensors(folder, f"{name}/state.safetensors", checkpoint.tensors)
    note = {"step": checkpoint.step, "sha256": sha256, "facts": checkpoint.facts}
    # Written last: a folder without it is not a checkpoint.
    folder.write(f"{name}/state.json", json.dumps(note).encode())
    for old in folder.names(CHECKPOINTS)[:-KEEP]:
        folder.delete(f"{CHECKPOINTS}/{old}")


def load_latest(folder: Folder, until: int) -> Checkpoint | None:
    """Load the newest whole checkpoint of a stage that is not past a step; a damaged one is passed over with a warning."""
    for name in reversed(folder.names(CHECKPOINTS)):
        if _step_of(name) > until:
            continue
        try:
            note = json.loads(folder.read(f"{CHECKPOINTS}/{name}/state.json"))
            tensors = read_tensors(folder, f"{CHECKPOINTS}/{name}/state.safetensors", note["sha256"])
        except (FileNotFoundError, json.JSONDecodeError, DamagedFileError) as error:
            log.warning("%s: passed over: %s", folder.address(f"{CHECKPOINTS}/{name}"), error)
            continue
        return Checkpoint(note["step"], tensors, note["facts"])
    return None


def newest_step(folder: Folder) -> int:
    """Step of the newest checkpoint of a stage, 0 where there is none."""
    return max(map(_step_of, folder.names(CHECKPOINTS)), default=0)


def _step_of(name: str) -> int:
    """Step of a checkpoint by the name of its folder."""
    return int(name.removeprefix("step-"))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Flatten an optimizer's state: `optimizer.<parameter number>.<name>`."""
    state = optimizer.state_dict()["state"]
    return {f"optimizer.{number}.{name}": value for number, values in state.items() for name, value in values.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restore what `optimizer_tensors` flattened; learning rates are set by the loop at every step."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        prefix, _, rest = key.partition(".")
        if prefix == "optimizer":
            number, _, name = rest.partition(".")
            state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
