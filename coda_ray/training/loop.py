"""The one training loop, as every Ray Train worker runs it: stream, step, log, checkpoint, resume.

Everything about a run is a function of its step, so a run that is resumed, by Ray after a worker's death or by the next
driver, continues as if nothing had happened.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import pyarrow as pa
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from coda_ray.config import Optimisation, Stream, Train
from coda_ray.learn.dino import CollapseGuard
from coda_ray.learn.objectives import Objective
from coda_ray.learn.optim import build_optimizer, set_rates
from coda_ray.learn.precision import Precision, choose_precision
from coda_ray.learn.schedules import Plateau, cosine, warmup_cosine
from coda_ray.progress import Tell
from coda_ray.storage import Folder
from coda_ray.tiles.plan import share_of
from coda_ray.tiles.reader import TileSource
from coda_ray.tiles.store import table_bytes
from coda_ray.tiles.stream import minibatches, on_device
from coda_ray.training import checkpoints
from coda_ray.training.checkpoints import Checkpoint
from coda_ray.training.launch import device_of

log = logging.getLogger(__name__)
Report = Callable[[int, int, dict[str, float]], None]


@dataclass(frozen=True)
class Monitor:
    """A score that training reports now and then.

    Parameters
    ----------
    every
        Steps between scores.
    measure
        Computes named scores of the current weights, on a device and in a precision.
    select
        Name of the score whose best weights are kept; None keeps the last.
    """

    every: int
    measure: Callable[[torch.device, Precision], dict[str, float]]
    select: str | None = None


@dataclass
class Work:
    """What a worker trains; built on the worker.

    Parameters
    ----------
    objective
        Network, loss and what follows a step.
    source
        Where samples come from.
    guard
        Watches the teacher's entropy.
    monitor
        Scores.
    plateau
        Lowers the learning rate by the monitor's `held_out_cross_entropy` and `held_out_accuracy`.
    """

    objective: Objective
    source: TileSource
    guard: CollapseGuard | None = None
    monitor: Monitor | None = None
    plateau: Plateau | None = None


@dataclass(frozen=True)
class TrainingRun:
    """Everything a worker needs to know; picklable, without weights.

    Parameters
    ----------
    title
        Shown in the log.
    folder
        Folder of the stage.
    seed
        Seed of stochastic depth.
    steps, warmup
        Optimisation steps of the whole run and of its warm-up.
    optimisation, train, stream
        Settings.
    build
        Makes the work, on the worker.
    report
        Receives (step, time in ms, metrics) at rank 0's log points; must not block.
    until
        Step at which to end, with the weights of that step; None goes to the end.
    checkpoints
        Where the checkpoints are, when they are those of a longer run; None takes `folder`.
    """

    title: str
    folder: Folder
    seed: int
    steps: int
    warmup: int
    optimisation: Optimisation
    train: Train
    stream: Stream
    build: Callable[[], Work]
    report: Report | None = None
    until: int | None = None
    checkpoints: Folder | None = None


def train_loop(config: Mapping[str, Any]) -> dict[str, Any]:
    """Train one stage on this worker.

    Parameters
    ----------
    config
        `{"run": TrainingRun, "tell": Tell | None}`, as Ray Train passes it.

    Returns
    -------
    dict
        Facts of the finished run: steps, seconds, the file of the weights, and the metrics of the last log point. Rank 0 has
        written the weights and `history.parquet` into the stage's folder.
    """
    run: TrainingRun = config["run"]
    torch.set_num_threads(run.train.threads)
    return _Worker(run, config["tell"]).train()


class _Worker:
    """One rank of a run."""

    def __init__(self, run: TrainingRun, tell: Tell | None) -> None:
        context = ray.train.get_context()
        self.run = run
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.tell = tell if self.rank == 0 else None
        self.device = device_of(run.train)
        self.precision = choose_precision(self.device, run.train.precision)
        torch.manual_seed(run.seed)
        self.work = run.build()
        self.objective = self.work.objective
        self.objective.to(self.device)
        self.network = self._wrap(self.objective.network)
        settings = run.optimisation
        self.optimizer = build_optimizer(
            self.objective.network, lr=settings.lr, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
        )
        self.trainable = [p for p in self.objective.network.parameters() if p.requires_grad]
        self.step, self.seconds = 0, 0.0
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Any] = {}
        self.best_tensors: dict[str, Tensor] = {}
        self.end = min(run.steps, run.until or run.steps)
        low, high = share_of(self.rank, self.world, settings.minibatch)
        self.samples = high - low
        self.saved = run.checkpoints or run.folder
        self.since = time.monotonic()
        self.images = 0
        self.replaced = 0

    def train(self) -> dict[str, Any]:
        """Run from the newest checkpoint to the end."""
        self._restore()
        self._tell()
        run = self.run
        self.objective.network.train()
        stream = minibatches(
            self.work.source,
            run.stream,
            minibatch=run.optimisation.minibatch,
            start_step=self.step,
            steps=self.end,
            rank=self.rank,
            world=self.world,
        )
        for tensors in on_device(stream, self.device):
            metrics = self._update(tensors)
            self.step += 1
            self._tell()
            last = self.step == self.end
            # The same on every rank, because ray.train.report waits for all of them.
            scoring = self._is_scored(last)
            scores = self._score() if scoring and self.rank == 0 else {}
            if self.step % run.train.log_every == 0 or last or scoring:
                self._log({**metrics, **scores})
            if scoring:
                self._share_rate()
            if self.step % run.train.checkpoint_every == 0 and not last:
                self._checkpoint()
        if self.saved is not run.folder:
            self._checkpoint()
        return self._finish()

    def _tell(self) -> None:
        """Say how far the run is, where that is shown."""
        if self.tell is not None:
            self.tell(self.step, self.end)

    def _wrap(self, network: nn.Module) -> nn.Module:
        """Data parallelism over more than one worker."""
        if self.world == 1:
            return network
        options = {"find_unused_parameters": self.objective.find_unused, "broadcast_buffers": False}
        wrapped: nn.Module = ray.train.torch.prepare_model(network, move_to_device=False, parallel_strategy_kwargs=options)
        return wrapped

    def _update(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """One optimisation step."""
        run, step = self.run, self.step
        settings = run.optimisation
        lr = warmup_cosine(step, run.steps, run.warmup, settings.lr_start, settings.lr, settings.lr_end)
        if self.work.plateau is not None:
            lr *= self.work.plateau.share
        decay = cosine(step, run.steps, settings.weight_decay, settings.weight_decay_end)
        set_rates(self.optimizer, lr=lr, weight_decay=decay)
        # Stochastic depth follows the step, so that a resumed run drops the same paths.
        torch.manual_seed((run.seed * 1_000_003 + step) * 4099 + self.rank)
        with self.precision.autocast():
            loss, metrics = self.objective.loss(self.network, tensors, step)
        self.optimizer.zero_grad(set_to_none=True)
        # Shares of a mini-batch may differ by one sample; the average over workers must not notice.
        (loss * (self.samples * self.world / settings.minibatch)).backward()
        self.objective.before_update(step)
        norm = nn.utils.clip_grad_norm_(self.trainable, settings.clip)
        self.optimizer.step()
        self.objective.after_update(step)
        self.images += settings.minibatch * (2 if "partner" in tensors else 1)
        self.replaced += int(tensors["replaced"].sum())
        return {**metrics, "lr": torch.tensor(lr), "weight_decay": torch.tensor(decay), "gradient_norm": norm.detach()}

    def _is_scored(self, last: bool) -> bool:
        """Whether the monitor is asked at this step."""
        monitor = self.work.monitor
        return monitor is not None and (last or self.step % monitor.every == 0)

    def _score(self) -> dict[str, float]:
        """Ask the monitor, and keep the best weights."""
        monitor = cast(Monitor, self.work.monitor)
        self.objective.network.eval()
        scores = monitor.measure(self.device, self.precision)
        self.objective.network.train()
        if monitor.select and scores[monitor.select] > self.best.get("score", -1.0):
            self.best = {"score": scores[monitor.select], "step": self.step}
            self.best_tensors = {k: v.detach().cpu().clone() for k, v in self.objective.state_dict().items()}
        if self.work.plateau is not None:
            self.work.plateau.watch(scores["held_out_cross_entropy"], scores["held_out_accuracy"])
        return scores

    def _share_rate(self) -> None:
        """Tell every rank the learning rate that rank 0, which alone scores, has come to."""
        if self.work.plateau is None or self.world == 1:
            return
        share = torch.tensor(self.work.plateau.share, dtype=torch.float64, device=self.device)
        dist.broadcast(share, 0)
        self.work.plateau.share = float(share)

    def _log(self, metrics: Mapping[str, Tensor | float]) -> None:
        """Write a log point: history, log line, live report, Ray."""
        now = time.monotonic()
        spent, self.since = now - self.since, now
        self.seconds += spent
        point = {name: float(value) for name, value in metrics.items()}
        point["images_per_s"] = self.images / max(spent, 1e-9)
        # Of this rank's share, since the first step.
        point["replaced_tiles"] = self.replaced
        self.images = 0
        for name in ("loss", "gradient_norm"):
            if not math.isfinite(point[name]):
                raise FloatingPointError(
                    f"{self.run.title}: {name} is {point[name]} at step {self.step}; lower the learning rate"
                )
        # Points that scoring and pausing add are no part of the run, so the guard's patience must not count them.
        if self.work.guard is not None and self.step % self.run.train.log_every == 0:
            self.work.guard.watch(self.step, point["entropy"], point["entropy_of_mean"], self.samples)
        if self.rank == 0:
            time_ms = int(time.time() * 1000)
            self.history.append({"step": self.step, "time_ms": time_ms, **point})
            if self.tell is None:
                self._print(point)
            if self.run.report is not None:
                self.run.report(self.step, time_ms, point)
        ray.train.report(point)

    def _print(self, point: Mapping[str, float]) -> None:
        """Write a log point as a line."""
        shown = "  ".join(
            f"{name} {point[name]:.4g}"
            for name in ("loss", "accuracy", "entropy", "knn", "held_out_accuracy", "images_per_s")
            if name in point
        )
        print(f"{self.run.title}: step {self.step}/{self.run.steps}  {shown}", flush=True)

    def _checkpoint(self) -> None:
        """Save at rank 0 what `_restore` needs."""
        if self.rank:
            return
        tensors = {**self.objective.state_dict(), **checkpoints.optimizer_tensors(self.optimizer)}
        tensors |= {f"best.{name}": value for name, value in self.best_tensors.items()}
        facts = {"history": self.history, "best": self.best, "seconds": self.seconds, "replaced": self.replaced}
        if self.work.guard is not None:
            facts["spell"] = self.work.guard.spell
        if self.work.plateau is not None:
            facts["plateau"] = asdict(self.work.plateau)
        checkpoints.save(self.saved, Checkpoint(self.step, tensors, facts))

    def _restore(self) -> None:
        """Continue from the newest checkpoint, if there is one."""
        checkpoint = checkpoints.load_latest(self.saved, self.end)
        if self.rank == 0:
            where = f"continues at step {checkpoint.step}" if checkpoint else "starts"
            print(f"{self.run.title}: {where}, {self.world} worker(s), {self.device}, {self.precision.reason}", flush=True)
        if checkpoint is None:
            return
        best = {k.removeprefix("best."): v for k, v in checkpoint.tensors.items() if k.startswith("best.")}
        own = {k: v for k, v in checkpoint.tensors.items() if not k.startswith(("best.", "optimizer."))}
        self.objective.load_state_dict(own)
        checkpoints.load_optimizer(self.optimizer, checkpoint.tensors)
        self.step, self.seconds = checkpoint.step, checkpoint.facts["seconds"]
        self.history, self.best, self.best_tensors = checkpoint.facts["history"], checkpoint.facts["best"], best
        self.replaced = checkpoint.facts["replaced"]
        if self.work.guard is not None:
            self.work.guard.spell = checkpoint.facts["spell"]
        if self.work.plateau is not None:
            self.work.plateau = Plateau(**checkpoint.facts["plateau"])

    def _finish(self) -> dict[str, Any]:
        """Write the result."""
        facts: dict[str, Any] = {"steps": self.end, "seconds": round(self.seconds, 3), "workers": self.world}
        facts["replaced_tiles"] = self.replaced
        if self.rank:
            return facts
        folder = self.run.folder
        tensors = self.best_tensors or self.objective.state_dict()
        facts |= checkpoints.write_result(folder, "model.safetensors", tensors)
        facts["precision"] = str(self.precision.dtype).removeprefix("torch.")
        if self.best:
            facts["best"] = self.best
        if self.history:
            facts["last"] = self.history[-1]
            folder.write("history.parquet", table_bytes(pa.Table.from_pylist(_rectangular(self.history))))
        return facts


def _rectangular(points: list[dict[str, float]]) -> list[dict[str, float | None]]:
    """Give every log point every column."""
    names = list(dict.fromkeys(name for point in points for name in point))
    return [{name: point.get(name) for name in names} for point in points]
