"""The Ray task that runs one stage; apart from the matrix, so that its processes import neither tables nor figures."""

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, cast

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from coda_ray.cluster import quieten
from coda_ray.config import Config, ConfigError, Train
from coda_ray.pipeline.stage import Stage
from coda_ray.progress import Say, Tell
from coda_ray.storage import open_place
from coda_ray.training.launch import resources
from coda_ray.training.loop import Report

# How long a job that ends early waits for its stages to end (s).
INTERRUPT_S = 10.0
Facts = ray.ObjectRef[dict[str, Any]]


def _run(stage: Stage, config: Config, report: Report | None, tell: Tell | None, *needs: dict[str, Any]) -> dict[str, Any]:
    """Run one stage in a Ray task; `needs` are there for their order alone."""
    quieten()
    if tell is not None:
        tell(0, 0)
    try:
        return stage.run(config, report, tell)
    finally:
        close = getattr(report, "close", None)
        if close is not None:
            close()


# max_calls=0 keeps the process, and what it has imported, for the next stage, on a GPU too; 1 gives each stage a new one.
_warm = ray.remote(max_calls=0)(_run)
_afresh = ray.remote(max_calls=1)(_run)


def submit(stage: Stage, config: Config, report: Report | None, needs: Sequence[Facts], tell: Tell | None = None) -> Facts:
    """Hand one stage to Ray; it starts when its needs are finished and its resources free.

    Parameters
    ----------
    stage
        The stage.
    config
        Settings; `train` says what it reserves.
    report
        Receives its log points.
    needs
        Stages on their way that it stands on.
    tell
        Receives how far it is, in its own process; None where it prints that itself.

    Returns
    -------
    ObjectRef
        Of its facts.
    """
    train = stage.part_of(config.train)
    wanted = {} if train.worker_range[1] else resources(train)
    # A process that has used one GPU cannot move to another: it is kept warm only where there is no other.
    warm = not wanted.get("GPU") or all(node["Resources"].get("GPU", 0) <= 1 for node in nodes())
    facts: Facts = (
        (_warm if warm else _afresh)
        .options(
            name=stage.kind,
            num_cpus=wanted.get("CPU", 0),
            num_gpus=wanted.get("GPU", 0),
            max_retries=config.train.max_failures,
            # Not out of the byte that a trial of Tune has reserved for itself.
            scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=cast(Any, None)),
        )
        .remote(stage, config, report, tell, *needs)
    )
    return facts


def run_missing(stages: Iterable[Stage], config: Config) -> None:
    """Run those of some stages that are not finished, side by side where their needs allow it, and wait.

    Parameters
    ----------
    stages
        Each after those it needs.
    config
        Settings.

    Raises
    ------
    Exception
        What the first stage that failed raised; the others are left to end by themselves.
    """
    results, running = open_place(config.results), dict[str, Facts]()
    for stage in stages:
        if stage.facts(results) is None:
            running[stage.key] = submit(stage, config, None, [running[need.key] for need in stage.needs if need.key in running])
    try:
        ray.get(list(running.values()))
    except ray.exceptions.RayError as error:
        raise cause_of(error) from None
    except BaseException:  # Ctrl-C, or the end of a trial
        interrupt(list(running.values()))
        raise


def interrupt(stages: Sequence[Facts]) -> None:
    """Break stages off before this process ends, so that they give back what other jobs wait for; whatever Ray says to it."""
    with suppress(Exception):
        for stage in stages:
            ray.cancel(stage)
        ray.wait(list(stages), num_returns=len(stages), timeout=INTERRUPT_S)


def room(train: Train) -> int:
    """Count the stages that the cluster has room for at a time; 1 at least, for a cluster may grow."""
    least = max(1, train.worker_range[0])
    have: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return max(1, min(int(have.get(name, 0) // (amount * least)) for name, amount in resources(train).items()))


def check_resources(train: Train, say: Say) -> None:
    """Tell what one worker wants and no node has, and what stays idle; without a cluster that could grow, stop.

    Parameters
    ----------
    train
        What one worker reserves.
    say
        Receives each line.

    Raises
    ------
    ConfigError
        When no node has what one worker wants, on a Ray that was started for this job alone.
    """
    largest = {name: max((node["Resources"].get(name, 0) for node in nodes()), default=0) for name in ("CPU", "GPU")}
    for name, amount in resources(train).items():
        if amount > largest[name]:
            option = f"train.{name.lower()}s_per_worker"
            told = f"{option} = {amount:g}: no node of this cluster has so much (at most {largest[name]:g} {name})"
            if not os.environ.get("RAY_ADDRESS"):
                raise ConfigError(f"{told}; lower --{option.replace('_', '-')}, or submit to a cluster")
            say(f"{told}; waiting for one that has")
    if largest["GPU"] and not train.gpus_per_worker:
        say("train.gpus_per_worker = 0: the GPUs of this cluster stay idle; --train.gpus-per-worker 1 uses them")


def nodes() -> list[dict[str, Any]]:
    """List the nodes that are alive."""
    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def cause_of(error: BaseException) -> BaseException:
    """Find what a stage raised, under what Ray and Ray Train wrap around it."""
    while True:
        workers: dict[int, BaseException] = getattr(error, "worker_failures", None) or {}
        under = getattr(error, "cause", None) or next(iter(workers.values()), None)
        if not isinstance(under, BaseException):
            return error
        error = under
