"""A stage is a function of its inputs: its folder is named by their hash, and a finished one is never run again."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from getpass import getuser
from typing import Any, Literal, NoReturn, cast
from uuid import uuid4

from pydantic import BaseModel

from coda_ray.config import Config, Train, pool_of
from coda_ray.lease import Lease, LostLeaseError
from coda_ray.pipeline.follower import PARTS, Follower
from coda_ray.progress import Tell
from coda_ray.storage import Folder, open_place
from coda_ray.tiles.store import TileIndex, content_key
from coda_ray.training.checkpoints import CHECKPOINTS, DamagedFileError
from coda_ray.training.launch import launch
from coda_ray.training.loop import Report

# Part of every key: raise that of a kind when a change of code, or of a default, changes the results of such stages; what stands
# on them follows.
RECIPES = {
    "pretrain": 2,
    "classify": 2,
    "adapt": 2,
    "evaluate": 2,
    "moments": 2,
    "correct": 2,
    "profile": 2,
    "criteria": 2,
    "combine": 2,
    "map": 2,
    "layers": 2,
    "imported": 2,
}
# Written last: a stage without it is not finished.
DONE = "done.json"
# A job that gave no sign of life for so long (s) is taken for dead, and another one goes on with its stage.
LEASE_S = 60.0
# Who waits for the stage of another job looks this often at first (s).
LOOK_S = 1.0


def settings_of(section: BaseModel, *, exclude: set[str] | None = None) -> dict[str, Any]:
    """List the settings of a section that differ from its defaults, for a key.

    A new option whose default is what was done before thus leaves finished stages valid.
    """
    return section.model_dump(mode="json", exclude_defaults=True, exclude=exclude)


@dataclass(frozen=True)
class Workload:
    """How much a stage has to do; it decides nothing about the result.

    Parameters
    ----------
    rate
        The kind of work: which field of `estimate`, without its `_per_s`, says how fast it goes.
    source
        Source of the tiles; of several labs the pool that they are.
    plates, tiles
        How many of them.
    steps, minibatch
        Optimisation steps or forward passes, and samples in each.
    samples
        Samples in all.
    tiles_per_sample
        2 where a sample is a pair.
    """

    rate: str
    source: str
    plates: int
    tiles: int
    steps: int
    minibatch: int
    samples: int
    tiles_per_sample: int = 1


def pass_inputs(config: Config, tiles: TileIndex) -> dict[str, Any]:
    """List what decides the result of one pass of tiles through a network, beside the network."""
    return {"tiles": tiles.fingerprint, "views": settings_of(config.views), "precision": config.train.precision}


def pass_workload(config: Config, tiles: TileIndex, rate: str = "inference") -> Workload:
    """Count one pass of tiles through a network."""
    return Workload(
        rate,
        source=pool_of(tiles.units("source")),
        plates=tiles.count("plate"),
        tiles=len(tiles),
        steps=-(-len(tiles) // config.evaluate.minibatch),
        minibatch=config.evaluate.minibatch,
        samples=len(tiles),
    )


@dataclass(frozen=True)
class Stage:
    """One piece of work and what it stands on.

    Parameters
    ----------
    kind
        One of `RECIPES`.
    title
        For people.
    inputs
        Everything besides `needs` that decides the result; JSON.
    needs
        Stages whose results this one reads.
    make
        Given the stage's folder and where to report, returns the worker loop and its description.
    workload
        How much it has to do, for the dry run; None where that was not counted.
    runs_on
        `workers`: as many as section `train` says; `worker`: one of them; `cpu`: one without a GPU.
    note
        What a person should know before it starts.
    whole
        The stage whose checkpoints this one goes on from and writes; no two of them run at once. None has its own.
    """

    kind: str
    title: str
    inputs: Mapping[str, Any]
    make: Callable[[Folder, Report | None], tuple[Callable[[Mapping[str, Any]], dict[str, Any]], Any]] = field(
        compare=False, repr=False
    )
    needs: tuple["Stage", ...] = ()
    workload: Workload | None = field(default=None, compare=False, repr=False)
    runs_on: Literal["workers", "worker", "cpu"] = field(default="workers", compare=False, repr=False)
    note: str | None = field(default=None, compare=False, repr=False)
    whole: "Stage | None" = field(default=None, compare=False, repr=False)

    @cached_property
    def key(self) -> str:
        """Hash of the inputs and of the stages below."""
        needs = [stage.key for stage in self.needs]
        return content_key({"recipe": RECIPES[self.kind], "kind": self.kind, "inputs": dict(self.inputs), "needs": needs})

    @property
    def path(self) -> str:
        """Folder of the stage, relative to the results."""
        return f"{self.kind}/{self.key}"

    def facts(self, results: Folder) -> dict[str, Any] | None:
        """Read what a finished stage wrote; None while it is unfinished."""
        return results.read_json(f"{self.path}/{DONE}")

    def part_of(self, train: Train) -> Train:
        """Take what this stage uses of the workers and GPUs that a configuration gives to each stage."""
        if self.runs_on == "workers":
            return train
        return train.model_copy(update={"workers": "0"} | ({"gpus_per_worker": 0.0} if self.runs_on == "cpu" else {}))

    def run(self, config: Config, report: Report | None, tell: Tell | None = None) -> dict[str, Any]:
        """Run the stage, or continue it, unless it is finished already; where another job is at it, take what that one finds.

        Parameters
        ----------
        config
            Where the results are, and how workers are launched.
        report
            Receives rank 0's log points.
        tell
            Receives how far rank 0 is; None where the stage prints it.

        Returns
        -------
        dict
            The stage's facts.

        Raises
        ------
        DamagedFileError
            As `check_made_of`.
        OSError
            When storage does not answer.
        """
        results = open_place(config.results)
        shared = results.child((self.whole or self).path)
        lease = Lease(shared.child("lease"), f"a job of {_user()}", LEASE_S, look_s=LOOK_S)
        steps = self.workload.steps if self.workload else 0
        while True:
            follower = Follower(self.title, partial(self.facts, results), shared, steps, tell)
            with lease:
                mine = lease.acquire(True, follower.met, follower.finished)
                # Another job may have come to its end just before its lease was free.
                if not mine or follower.finished():
                    return cast(dict[str, Any], follower.facts)
                if follower.waited:
                    why = f"gave no sign of life for {LEASE_S:g} s" if lease.took_over else "ended without a result"
                    print(f"{self.title}: the other job {why}; this job goes on with it", flush=True)
                try:
                    return self._work(config, report, tell, lease, results)
                except Exception:
                    try:
                        lease.check()
                    except LostLeaseError as lost:
                        print(f"{self.title}: {lost}; this job looks what has become of it", flush=True)
                    else:
                        raise

    def _work(self, config: Config, report: Report | None, tell: Tell | None, lease: Lease, results: Folder) -> dict[str, Any]:
        """Run the stage under a lease."""
        check_made_of([self], results)
        folder = results.child(self.path)
        guarded = lease.guard(folder)
        note = {"stage": self.kind, "key": self.key, "title": self.title, "inputs": dict(self.inputs)}
        note |= {"needs": [stage.path for stage in self.needs], "made_of": _made_of(self, results)}
        guarded.write("stage.json", json.dumps(note, indent=1).encode())
        loop, run = self.make(guarded, report)
        facts = launch(loop, run, self.part_of(config.train), results, tell)
        # What stalled for long may still end its work, if nobody came meanwhile.
        lease.beat()
        lease.check()
        return finish(folder, facts)


def finish(folder: Folder, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write `done.json` of a stage whose results are written, unless it is there, and delete what is needed no more.

    Parameters
    ----------
    folder
        Of the stage.
    facts
        What is told of the result; `file` names that of its tensors, which no other attempt writes to.

    Returns
    -------
    dict
        The facts that are there now: of several jobs that come to the end, those of the first.
    """
    own = {**facts, "attempt": uuid4().hex}
    folder.create(DONE, json.dumps(own, indent=1).encode())
    kept = folder.read_json(DONE) or own
    for name in folder.names():
        if name in (CHECKPOINTS, PARTS) or ("file" in kept and name.endswith(".safetensors") and name != kept["file"]):
            folder.delete(name)
    return kept


def _user() -> str:
    """Name the person who runs this job, for others."""
    try:
        return getuser()
    except (KeyError, OSError):  # as in a container
        return "somebody"


def not_run(folder: Folder, report: object) -> NoReturn:
    """Stand in for the work of a stage that came finished."""
    raise NotImplementedError(f"{folder.address()} came finished, to be looked at, not to be run")


def with_needs(stages: Iterable[Stage]) -> list[Stage]:
    """List stages and what they need, once, each after those it needs."""
    ordered: dict[str, Stage] = {}

    def visit(stage: Stage) -> None:
        if stage.key not in ordered:
            for need in stage.needs:
                visit(need)
            ordered[stage.key] = stage

    for stage in stages:
        visit(stage)
    return list(ordered.values())


def check_made_of(stages: Iterable[Stage], results: Folder) -> None:
    """Refuse stages that were made of other weights than those that now lie in the folders below them.

    A key names inputs. Training the same inputs again, on another machine or GPU, gives other weights under the same key, and a
    classifier of the first run cannot read features of the second: that would look like a bad result and not like a mistake.

    Parameters
    ----------
    stages
        They and all that they stand on are looked at, as far as their folders tell.
    results
        Where they are.

    Raises
    ------
    DamagedFileError
        Names the stage, the weights, and what to delete.
    """
    for stage in with_needs(stages):
        told = results.read_json(f"{stage.path}/stage.json") or {}
        now = _made_of(stage, results) if told.get("made_of") else {}
        for need in stage.needs:
            then = told.get("made_of", {}).get(need.path)
            if then and then != now.get(need.path, then):
                raise DamagedFileError(
                    f"{results.address(stage.path)}: {stage.title} was made of the {need.title} with SHA-256 {then[:12]}..., but "
                    f"{results.address(need.path)} has {now[need.path][:12]}...: it was trained again, or results of two runs "
                    f"were put together; delete {results.address(stage.path)} to make it of the weights that are there"
                )


def _made_of(stage: Stage, results: Folder) -> dict[str, str]:
    """SHA-256 of the weights of each finished stage that a stage stands on, by their folders; not all have weights."""
    found = {need.path: need.facts(results) or {} for need in stage.needs}
    return {path: facts["sha256"] for path, facts in found.items() if "sha256" in facts}
