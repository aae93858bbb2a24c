"""What a person reads on a run's page in MLflow: its name, what it found, and the command that makes it again."""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import yaml

from coda_ray.config import Config
from coda_ray.tracking.table import OF_SPLIT, markdown_matrix, matrices

NOTE_LENGTH = 7500  # of the 8000 characters that MLflow keeps
MOST_COMMANDS = 16
CONFIG = "config.yaml"
# Sections that say where things are, or what is shown, and decide no result.
UNTOLD = ("bucket", "metadata", "tiles", "results", "stream", "train", "tracking", "estimate", "report")
EXPERIMENT_NOTE = (
    "Jobs of coda_ray: matrices, single adaptations and sweeps, with their transfers, training stages or trials below them.\n\n"
    "- all jobs: `tags.kind = 'job'`; sweeps alone: `tags.job = 'tune'`\n"
    "- plates that a watcher took: `tags.kind = 'plate'`\n"
    "- strategies on arriving plates: `tags.kind = 'course'`\n"
    "- transfers of one kind: `params.method = 'coda' and params.scope = 'whole'`\n"
    "- `oracle_…` reads labels of the target: for research, never to choose by\n"
)


def markdown_matrices(matrix: pd.DataFrame, metrics: Sequence[str]) -> str:
    """Write every matrix of some metrics in Markdown, one below the other."""
    return "\n".join(markdown_matrix(part) for metric in metrics for part in matrices(matrix, metric))


def config_text(record: Mapping[str, Any]) -> str:
    """Write a job's resolved configuration as YAML, which the jobs read again by `--config`."""
    return str(yaml.safe_dump(record["config"], sort_keys=False))


def settings_of(record: Mapping[str, Any]) -> dict[str, str]:
    """List the settings of a job that are not the defaults, by dotted names, so that jobs can be compared by them.

    Parameters
    ----------
    record
        The job's record.

    Returns
    -------
    dict
        Name to value as text; without places, MLflow's own section, and the lists that the description tells of.
    """
    chosen = {name: value for name, value in record["config"].items() if name not in UNTOLD}
    defaults = _flat(Config().model_dump(mode="json"))
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in _flat(chosen).items()
        if name not in defaults or value != defaults[name]
    }


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Name the fields of nested sections by their path."""
    found: dict[str, Any] = {}
    for name, value in section.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def job_note(record: Mapping[str, Any], matrix: pd.DataFrame | None) -> str:
    """Describe a job: what it found and the command that makes it again, as long as MLflow keeps it.

    Parameters
    ----------
    record
        The job's record.
    matrix
        From `table.job_matrix`; None or empty where there is none.
    """
    made = f"Made by the following; its whole configuration is {CONFIG}, among the artifacts.\n\n```\n{record['command']}\n```\n"
    parts = [] if matrix is None or matrix.empty else [markdown_matrices(matrix, ["accuracy", "macro_f1"])]
    found = "\n".join([*parts, record.get("summary", "")]).strip()
    room = NOTE_LENGTH - len(made)
    rest = "every trial is in report/trials.csv" if record["kind"] == "tune" else "the whole matrix is in matrix.md"
    cut = f"{found[:room].rpartition(chr(10))[0]}\n\n… {rest}" if len(found) > room else found
    return f"{cut}\n\n{made}".lstrip()


def transfer_name(record: Mapping[str, Any]) -> str:
    """Name a transfer; what goes without saying (the whole target, all compounds) is left out."""
    parts = [f"{record['method']} {record['source']} → {record['target']}"]
    if record["granularity"] != "source":
        parts.append(f"{record['granularity']} {record['unit']}")
        parts += ["scored on all"] if record["scope"] == "whole" else []
    return f"{', '.join(parts)}{OF_SPLIT[record['split']]}, seed {record['seed']}"


def transfer_note(record: Mapping[str, Any], job: Mapping[str, Any]) -> str:
    """Give the command that makes a transfer of a job alone."""
    flags = {name: record[name] for name in ("source", "target", "method", "granularity", "split", "seed")}
    return _again(job, [_options(flags)])


def trial_name(record: Mapping[str, Any]) -> str:
    """Name a trial by its values."""
    shown = {name.rpartition(".")[2]: value for name, value in record["point"].items()}
    return ", ".join(f"{name} {f'{value:.4g}' if isinstance(value, float) else value}" for name, value in shown.items())


def trial_note(record: Mapping[str, Any], job: Mapping[str, Any]) -> str:
    """Give the commands that make a trial of a sweep alone, one for each pair and seed."""
    return _again(job, trial_options(record["point"], job["config"]["tune"]))


def trial_options(point: Mapping[str, Any], tune: Mapping[str, Any]) -> list[str]:
    """Spell the options of jobs/adapt.py, beside the sweep's own, that make a trial alone: a line for each pair and seed.

    Parameters
    ----------
    point
        The trial's values.
    tune
        Section tune of the sweep's configuration.
    """
    values = dict(point)
    how = {name: values.pop(name, tune[name]) for name in ("method", "granularity")}
    ends = [(source, target, seed) for source, target in tune["pairs"] for seed in tune["seeds"]]
    return [_options({"source": source, "target": target, **how, "seed": seed, **values}) for source, target, seed in ends]


def adapt_block(options: Sequence[str]) -> str:
    """Write commands of one adaptation each, which read the configuration among a job's artifacts, in Markdown."""
    told = "\n".join(f"python jobs/adapt.py --config {CONFIG} \\\n    {line}" for line in options[:MOST_COMMANDS])
    if len(options) > MOST_COMMANDS:
        told += f"\n# and {len(options) - MOST_COMMANDS} more, which differ in source, target and seed"
    return f"```\n{told}\n```\n"


def plate_name(record: Mapping[str, Any]) -> str:
    """Name a plate of a watcher."""
    return f"{record['source']}/{record['batch']}/{record['plate']}"


def plate_note(record: Mapping[str, Any]) -> str:
    """Say which model a plate got, why, and where its predictions are."""
    drift = "not measured" if record["drift_source"] is None else f"{record['drift_source']:.2f} from the source"
    near = "" if record["drift_nearest"] is None else f", {record['drift_nearest']:.2f} from {record['nearest']}"
    limit = "" if record["threshold"] is None else f" (threshold {record['threshold']:.2f})"
    return (
        f"Predicted by the model of **{record['model']}**: {record['why']}.\n\n"
        f"Drift of its DMSO images, in standard deviations of the source: {drift}{near}{limit}.\n\n"
        f"Predictions: `{record['folder']}`\n"
    )


def course_note(record: Mapping[str, Any], job: Mapping[str, Any]) -> str:
    """Say what a strategy does, and how to read its curves."""
    return f"Part of *{job['name']}*. {record['strategy']}: {record['about']}. The step of its curves is the turn of a plate.\n"


def _again(job: Mapping[str, Any], options: Sequence[str]) -> str:
    """Say what a run is part of, and how to make it alone."""
    return f"Part of *{job['name']}*. With {CONFIG} out of the artifacts of the run above this one:\n\n{adapt_block(options)}"


def _options(flags: Mapping[str, Any]) -> str:
    """Spell options as the command line reads them."""
    return shlex.join(word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", _word(value)))


def _word(value: Any) -> str:
    """Spell a value."""
    return str(value).lower() if isinstance(value, bool) else str(value)
