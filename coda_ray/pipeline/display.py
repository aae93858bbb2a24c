"""What a terminal shows while stages run: a bar for each, what waits, and the time left; elsewhere they print their own lines."""

import sys
import time
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from types import TracebackType

import ray
from rich import get_console
from rich.console import Console, Group, JustifyMethod
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from coda_ray.config import Train
from coda_ray.pipeline.stage import Stage
from coda_ray.pipeline.standing import Row, Standing, View
from coda_ray.pipeline.tally import Tally
from coda_ray.pipeline.task import Facts, room
from coda_ray.progress import Tell

LOOK_EVERY_S = 1.0
# Redrawing this often costs the driver about 1 % of a core.
REDRAWN_PER_S = 2
# Columns of a bar, which takes what titles leave.
LEAST_BAR, MOST_BAR = 10, 40
# Columns that titles keep at least; there are no bars where there is no room for both.
LEAST_TITLE = 40
# Of a title that is too long, the share of what is kept that comes from its head (method, source and target), and by how many
# columns more it may take to end with a word.
HEAD, TO_WORD_END = 0.7, 4
# Lines of a terminal that are not given to rows of stages.
OTHER_LINES = 4


class Display(AbstractContextManager["Display"]):
    """Waits for stages, and shows nothing: they print how far they are."""

    def __exit__(self, kind: type[BaseException] | None, raised: BaseException | None, traceback: TracebackType | None) -> None:
        """Nothing was begun."""

    def teller(self, stage: Stage) -> Tell | None:
        """Give what a stage tells how far it is with; None where it prints that."""
        return None

    def wait(self, references: Sequence[Facts]) -> Facts:
        """Wait for the first of some stages to end."""
        (reference,), _ = ray.wait(list(references), num_returns=1)
        return reference

    def ended(self, stage: Stage, *, failed: bool) -> None:
        """Take note of the end of a stage."""


class LiveDisplay(Display):
    """Shows the stages that run at the foot of a terminal, above which lines scroll, and leaves nothing behind.

    Parameters
    ----------
    standing
        Of the job.
    console
        The terminal.
    """

    def __init__(self, standing: Standing, console: Console) -> None:
        self._standing, self._tally = standing, Tally()
        self._view = standing.view(time.monotonic())
        self._live = Live(
            get_renderable=lambda: picture(self._view, console.width, console.height),
            console=console,
            refresh_per_second=REDRAWN_PER_S,
            transient=True,
        )

    def __enter__(self) -> "LiveDisplay":
        """Begin to show."""
        self._live.start(refresh=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, raised: BaseException | None, traceback: TracebackType | None) -> None:
        """Give the terminal back as it was, whatever happened."""
        self._live.stop()

    def teller(self, stage: Stage) -> Tell:
        """Give what a stage tells how far it is with."""
        return self._tally.teller(stage.key)

    def wait(self, references: Sequence[Facts]) -> Facts:
        """Wait for the first of some stages to end, and show meanwhile what the others tell."""
        while True:
            ended, _ = ray.wait(list(references), num_returns=1, timeout=LOOK_EVERY_S)
            self._look()
            if ended:
                return ended[0]

    def ended(self, stage: Stage, *, failed: bool) -> None:
        """Take a stage off the list of those that run."""
        now = time.monotonic()
        self._standing.ended(stage.key, now, failed=failed)
        self._view = self._standing.view(now)

    def _look(self) -> None:
        """Take what was told."""
        now = time.monotonic()
        for key, (done, total) in self._tally.news().items():
            self._standing.told(key, done, total, now)
        self._view = self._standing.view(now)


def display_of(stages: Sequence[Stage], finished: Collection[str], train: Train) -> Display:
    """Choose how the stages of a job are shown.

    Parameters
    ----------
    stages
        Each after those it needs.
    finished
        Keys of those that are finished.
    train
        Says how many run at a time.

    Returns
    -------
    Display
        Live on a terminal, where something is left to do.
    """
    console = get_console()
    if len(finished) == len(stages) or not (sys.stdout.isatty() and console.is_interactive):
        return Display()
    return LiveDisplay(Standing(stages, finished, room(train)), console)


def picture(view: View, width: int, height: int) -> Group:
    """Draw a job at one moment, in less than the width and height of the terminal.

    Parameters
    ----------
    view
        What is drawn.
    width, height
        Columns and lines of the terminal.
    """
    rows = view.rows[: max(1, height - OTHER_LINES)]
    done = f"{view.finished} of {view.total} stages finished" + (f", {view.failed} failed" if view.failed else "")
    titles = [*(row.title for row in rows), done]
    counts = [*(f"{row.done}/{row.total}" if row.total else "" for row in rows), ""]
    times = [*map(_time_of, rows), _time_of_all(view)]
    amounts = [*((row.done, row.total) for row in rows), (view.finished, view.total)]
    longest = max(map(len, titles))
    # What counts and times leave, with a column between any two and one that stays free.
    rest = width - 1 - sum(used + 1 for used in (max(map(len, counts)), max(map(len, times))) if used)
    bar = min(MOST_BAR, max(LEAST_BAR, rest - longest - 1))
    bar = bar if rest - bar - 1 >= min(LEAST_TITLE, longest) else 0
    rest -= bar + 1 if bar else 0
    table = Table.grid(padding=(0, 1, 0, 0))
    for title, (part, whole), count, spent in zip(titles, amounts, counts, times, strict=True):
        bars = [ProgressBar(total=whole or None, completed=part, width=bar)] if bar else []
        table.add_row(_line(shortened(title, max(1, rest))), *bars, _line(count, "right"), _line(spent, "right"))
    others = _line(_others(view, len(rows)))
    others.truncate(max(1, width - 1), overflow="ellipsis")
    return Group(table, others)


def shortened(title: str, width: int) -> str:
    """Cut a title that is too long in the middle: what is done to which target stays at the left, unit or tiles at the right."""
    if len(title) <= width:
        return title
    head = round(HEAD * (width - 1))
    word = title.find(" ", head)
    if 0 <= word - head <= TO_WORD_END and word < width - 1:
        head = word
    return f"{title[:head]}…{title[len(title) - (width - 1 - head) :]}"


def duration(seconds: float) -> str:
    """Write minutes and seconds, or hours and minutes."""
    whole = round(seconds)
    return f"{whole // 60}:{whole % 60:02d}" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02d}"


def _line(text: str, justify: JustifyMethod = "left") -> Text:
    """Keep a text on one line, and its brackets as they are."""
    return Text(text, justify=justify, no_wrap=True, overflow="ellipsis")


def _time_of(row: Row) -> str:
    """Say how long a stage still takes, or how long it has run where that is not known."""
    return f"for {duration(row.elapsed_s)}" if row.left_s is None else f"{duration(row.left_s)} left"


def _time_of_all(view: View) -> str:
    """Say how long the job still takes at these speeds, or what it takes longer than."""
    return "" if view.left_s is None else f"{'~' if view.whole else '>'}{duration(view.left_s)} left"


def _others(view: View, shown: int) -> str:
    """Name the stages that have no row."""
    more = len(view.rows) - shown
    waiting = ", ".join(f"{number} {kind}" for kind, number in view.waiting.items())
    return "; ".join(filter(None, (f"{more} more running" if more else "", f"waiting: {waiting}" if waiting else "")))
