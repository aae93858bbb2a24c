"""How far the stages of a job are, by what running ones tell: events in, rows and times out; without clock, Ray or terminal."""

import heapq
import math
from collections import Counter, defaultdict, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from coda_ray.pipeline.stage import Stage

# Speeds of a stage forget what is older than about this (s).
REMEMBERED_S = 30.0


@dataclass(frozen=True)
class Row:
    """A stage that runs.

    Parameters
    ----------
    title
        Of the stage.
    done, total
        Steps or mini-batches; 0 of 0 where it does not tell.
    elapsed_s
        Seconds since it began.
    left_s
        Seconds to its last step; None where that is not known.
    """

    title: str
    done: int
    total: int
    elapsed_s: float
    left_s: float | None


@dataclass(frozen=True)
class View:
    """A job at one moment.

    Parameters
    ----------
    rows
        Stages that run, the one that began first before the others.
    finished, failed, total
        Stages; those that cannot run because others failed have failed too.
    waiting
        Kind to number of the stages that have not begun.
    left_s
        Seconds to the end of the job, as far as they are known; None where nothing is.
    whole
        Whether the speed of all that is left is known; if not, the job takes longer than `left_s`.
    """

    rows: tuple[Row, ...]
    finished: int
    failed: int
    total: int
    waiting: Mapping[str, int]
    left_s: float | None
    whole: bool


class _Run:
    """A stage that runs; times are seconds of the caller's clock."""

    def __init__(self, now: float) -> None:
        self.begun = self.at = now
        self.done = self.total = self.first = 0
        # Both fade, so that their quotient is the present speed.
        self._seconds = self._steps = 0.0

    def tell(self, done: int, total: int, now: float) -> None:
        """Take how far it is."""
        if total != self.total or done < self.done:
            self.total, self.first, self.at = total, done, now
            self._seconds = self._steps = 0.0
        elif done > self.done:
            kept = math.exp(-(now - self.at) / REMEMBERED_S)
            self._seconds = self._seconds * kept + now - self.at
            self._steps = self._steps * kept + done - self.done
            self.at = now
        self.done = done

    @property
    def step_s(self) -> float | None:
        """Seconds that a step takes; None until two numbers of steps were told."""
        return self._seconds / self._steps if self._steps else None

    def left_s(self, now: float) -> float | None:
        """Seconds to its last step; the step that it is in counts down."""
        if self.step_s is None:
            return None
        return max(0.0, (self.total - self.done) * self.step_s - min(now - self.at, self.step_s))

    @property
    def share(self) -> float:
        """Share of its work that it does itself; the rest was done before it was broken off."""
        return (self.total - self.first) / self.total if self.total > self.first else 1.0


class Standing:
    """Follows the stages of a job.

    Parameters
    ----------
    stages
        Each after those it needs.
    finished
        Keys of those that were finished before.
    slots
        How many run at a time.
    """

    def __init__(self, stages: Sequence[Stage], finished: Collection[str], slots: int) -> None:
        self._stages = {stage.key: stage for stage in stages}
        self._finished, self._failed = set(finished), set[str]()
        self._running: dict[str, _Run] = {}
        self._slots = slots
        # Of the stages that ended, by the kind of work.
        self._amounts: dict[str, float] = defaultdict(float)
        self._seconds: dict[str, float] = defaultdict(float)

    def told(self, key: str, done: int, total: int, now: float) -> None:
        """Take what a stage tells; what comes after its end is late.

        Parameters
        ----------
        key
            Of the stage.
        done, total
            How much is done, and of how much; 0 of 0 when it begins, or begins again.
        now
            Seconds of any clock that does not go back.
        """
        if key in self._stages and key not in self._finished | self._failed:
            if key not in self._running or not total:
                self._running[key] = _Run(now)
            self._running[key].tell(done, total, now)

    def ended(self, key: str, now: float, *, failed: bool) -> None:
        """Take the end of a stage; one that needed a failed stage ends as failed without having begun."""
        run = self._running.pop(key, None)
        (self._failed if failed else self._finished).add(key)
        if run is not None and not failed:
            work, amount = _work(self._stages[key])
            self._amounts[work] += amount * run.share
            self._seconds[work] += now - run.begun

    def view(self, now: float) -> View:
        """Say how things stand.

        Parameters
        ----------
        now
            Seconds of the clock of `told`.
        """
        rows = [
            Row(self._stages[key].title, run.done, run.total, now - run.begun, run.left_s(now))
            for key, run in self._running.items()
        ]
        seconds = dict(self._seconds_left(now))
        known = {key: left for key, left in seconds.items() if left is not None}
        left = None
        if known:
            needs = {key: [need.key for need in self._stages[key].needs] for key in seconds}
            slots = max(self._slots, len(rows))
            left = makespan({key: known.get(key, 0.0) for key in seconds}, needs, slots)
        return View(
            tuple(rows),
            len(self._finished),
            len(self._failed),
            len(self._stages),
            Counter(self._stages[key].kind for key in seconds if key not in self._running),
            left,
            len(known) == len(seconds),
        )

    def _seconds_left(self, now: float) -> Iterator[tuple[str, float | None]]:
        """Give what each stage that has not ended still takes, those that run first; None where that is not known."""
        per_amount = self._speeds()
        ended = self._finished | self._failed
        for key in [*self._running, *(key for key in self._stages if key not in ended | self._running.keys())]:
            run = self._running.get(key)
            left = run.left_s(now) if run else None
            work, amount = _work(self._stages[key])
            if left is None and work in per_amount:
                left = max(0.0, amount * per_amount[work] - (now - run.begun if run else 0.0))
            yield key, left

    def _speeds(self) -> dict[str, float]:
        """Seconds per amount of each kind of work, by the stages that ended, else by one that runs."""
        found = {}
        for key, run in self._running.items():
            if run.step_s is not None:
                work, amount = _work(self._stages[key])
                found[work] = run.step_s * run.total / amount
        return found | {work: self._seconds[work] / amount for work, amount in self._amounts.items()}


def _work(stage: Stage) -> tuple[str, float]:
    """Name a stage's kind of work, and how much of it there is: samples, or one stage where they are not counted."""
    return (stage.workload.rate, stage.workload.samples) if stage.workload else (stage.kind, 1)


def makespan(seconds: Mapping[str, float], needs: Mapping[str, Collection[str]], slots: int) -> float:
    """Compute when work ends of which so many pieces are done at a time, each after those it needs, the first of the rest next.

    Parameters
    ----------
    seconds
        What each piece takes.
    needs
        Pieces that each waits for; those that `seconds` does not name are done.
    slots
        How many are done at a time.

    Returns
    -------
    float
        Seconds from the beginning.
    """
    missing = {piece: len(set(needs[piece]) & seconds.keys()) for piece in seconds}
    followers: dict[str, list[str]] = defaultdict(list)
    for piece in seconds:
        for need in set(needs[piece]):
            followers[need].append(piece)
    ready = deque(piece for piece, left in missing.items() if not left)
    underway: list[tuple[float, str]] = []
    now = 0.0
    while ready or underway:
        while ready and len(underway) < slots:
            piece = ready.popleft()
            heapq.heappush(underway, (now + seconds[piece], piece))
        now, piece = heapq.heappop(underway)
        for follower in followers[piece]:
            missing[follower] -= 1
            if not missing[follower]:
                ready.append(follower)
    return now
