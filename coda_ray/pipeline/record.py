"""What the results keep of a job, for tables, reports and MLflow."""

import json
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from coda_ray.config import Config, labs_of
from coda_ray.pipeline import data
from coda_ray.pipeline.stage import Stage
from coda_ray.storage import Folder

TRAINING = ("pretrain", "classify", "adapt")
GIT_WAIT_S = 10


def job_record(
    config: Config,
    *,
    key: str,
    kind: str,
    name: str,
    command: str,
    pairs: Iterable[tuple[str | None, str]],
    transfers: Sequence[str],
    stages: Sequence[Stage],
) -> dict[str, Any]:
    """Describe a job, as it is kept in `jobs/<key>.json`.

    Parameters
    ----------
    config
        Settings.
    key, kind, name
        What the job is called: `adapt`, `matrix`, `tune`, `online` or `watch`, and a title.
    command
        The command line.
    pairs
        Source and target of everything that it does; no source where the model was imported.
    transfers
        Keys of the transfers that it scores.
    stages
        Its stages; those that train are kept.

    Returns
    -------
    dict
        JSON: key, kind, name, command, commit and dirty (where the code is a git checkout), config, data (one entry per lab:
        name, address, fingerprint, tiles, context), transfers, stages.
    """
    return {
        "key": key,
        "kind": kind,
        "name": name,
        "command": command,
        **code_state(Path(__file__).resolve().parents[2]),
        "config": config.model_dump(mode="json"),
        "data": data_used(config, list(pairs)),
        "transfers": list(transfers),
        "stages": [stage.path for stage in stages if stage.kind in TRAINING],
    }


def write_job(results: Folder, job: Mapping[str, Any]) -> None:
    """Keep the record of a job in `jobs/<key>.json`.

    Parameters
    ----------
    results
        The results folder.
    job
        From `job_record`.
    """
    results.write(f"jobs/{job['key']}.json", json.dumps(job, indent=1).encode())


def data_used(config: Config, pairs: Sequence[tuple[str | None, str]]) -> list[dict[str, Any]]:
    """List the tiles that a job reads, lab by lab; addresses hold no keys, for the configuration refuses them.

    Raises
    ------
    FileNotFoundError
        When a source has no finished plate.
    """
    roles = {
        "source": {lab for source, _ in pairs if source for lab in labs_of(source)},
        "target": {lab for _, target in pairs for lab in labs_of(target)},
    }
    found = []
    for name in dict.fromkeys(lab for ends in pairs for end in ends if end for lab in labs_of(end)):
        index = data.stored_tiles(config, name)
        found.append(
            {
                "name": name,
                "address": index.folder.address(name),
                "fingerprint": index.fingerprint,
                "tiles": len(index),
                "context": ", ".join(role for role, names in roles.items() if name in names),
            }
        )
    return found


def code_state(root: Path) -> dict[str, Any]:
    """Name the commit that a folder of code is at.

    Parameters
    ----------
    root
        The folder.

    Returns
    -------
    dict
        `commit`, and `dirty`: whether tracked files differ from it. Empty where the folder is no git checkout of its own.
    """
    git = shutil.which("git")
    # A library inside another project's checkout is not that project's commit.
    if git is None or not (root / ".git").exists():
        return {}

    def ask(*words: str) -> str:
        command = [git, "-C", str(root), *words]
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=GIT_WAIT_S)  # noqa: S603 (our words)
        return told.stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):  # no commit yet, or a checkout of somebody else that git refuses
        return {}
