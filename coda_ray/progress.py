"""Progress of long work: a bar in a terminal, a line every few seconds elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import get_console
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 5.0
# Receives lines of progress.
Say = Callable[[str], None]
# Receives how much is done, and of how much; 0 of 0 has begun and knows no more.
Tell = Callable[[int, int], None]


def job_console(width: int) -> Console:
    """Give the console that a job prints on.

    Parameters
    ----------
    width
        Columns where the output is no terminal.

    Returns
    -------
    Console
        In a terminal that of the whole process, so that lines scroll above what is live on it.
    """
    return get_console() if sys.stdout.isatty() else Console(width=width)


@contextmanager
def progress_bar(title: str, unit: str) -> Iterator[Tell]:
    """Show progress while the block runs.

    Parameters
    ----------
    title
        What is being done.
    unit
        What is counted, in the plural.

    Yields
    ------
    Tell
        Takes how many are done and their total.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task(title, total=None)
        last = time.monotonic()

        def show(done: int, total: int) -> None:
            nonlocal last
            bar.update(task, completed=done, total=total)
            if not bar.console.is_terminal and (done == total or time.monotonic() - last > SECONDS_BETWEEN_LINES):
                print(f"{title}: {done}/{total} {unit}", flush=True)
                last = time.monotonic()

        yield show
