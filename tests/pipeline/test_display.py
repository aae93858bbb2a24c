"""What a terminal shows while stages run."""

import io
import os
import pty
import re
import sys
import threading
from contextlib import suppress

import pytest
import ray
from rich.console import Console

from coda_ray import progress
from coda_ray.config import Train
from coda_ray.pipeline import display
from coda_ray.pipeline.display import Display, LiveDisplay, display_of, duration, picture, shortened
from coda_ray.pipeline.report import run_job
from coda_ray.pipeline.request import Request
from coda_ray.pipeline.standing import Row, Standing, View
from invented import invented_chain
from synthetic import small_config, write_tiles

LEARN, ADAPT, *_ = STAGES = invented_chain()
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"  # the cursor
BATCH = "adapt coda source_3 to source_10 batch 2021_08_17_U2OS_48_hr_run16, seed 0"
VIEW = View(
    rows=(
        Row(BATCH, 312, 1500, 60.0, 70.4),
        Row(f"evaluate {BATCH} on source_10", 2, 9, 5.0, 3960.0),
        Row(f"profiles of evaluate {BATCH} on source_10", 0, 0, 61.2, None),
    ),
    finished=3,
    failed=1,
    total=15,
    waiting={"adapt": 4, "evaluate": 6},
    left_s=12000.0,
    whole=False,
)


def screen(written, height=1000):
    """The lines that a terminal shows of what was written to it, by the few codes that are used here."""
    lines, row, column = [""] * height, 0, 0
    for code, end, text in re.findall(r"\x1b\[([?0-9;]*)([A-Za-z])|([\r\n]|[^\x1b\r\n]+)", written):
        if end == "A":
            row -= int(code or 1)
        elif end == "K":
            lines[row] = ""
        elif text == "\n":
            row, column = row + 1, 0
        elif text == "\r":
            column = 0
        else:
            assert end in ("", "m", "l", "h"), end
            lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + len(text) :]
            column += len(text)
    assert not any(lines[row:])
    return [line.rstrip() for line in lines[:row]]


def drawn(view, width=80, height=24, **options):
    """The lines of a recorded console, and what it writes to its terminal."""
    console = Console(record=True, force_terminal=True, width=width, file=io.StringIO(), **options)
    console.print(picture(view, width, height))
    return [line.rstrip() for line in console.export_text().splitlines()], console.file.getvalue()


def test_a_job_on_a_terminal_of_80_columns():
    lines, _ = drawn(VIEW, no_color=True)
    assert lines[0] == "adapt coda source_3 to source_10…run16, seed 0 ━━         312/1500    1:10 left"
    assert lines[1] == "evaluate adapt coda source_3 to…0 on source_10 ━━              2/9  1 h 06 left"
    # A bar that moves, whatever it looks like at this moment.
    assert lines[2].startswith("profiles of evaluate adapt coda…0 on source_10 ")
    assert lines[2].endswith(" for 1:01")
    assert "━" in lines[2]
    assert lines[3] == "3 of 15 stages finished, 1 failed              ━━                  >3 h 20 left"
    assert lines[4] == "waiting: 4 adapt, 6 evaluate"
    assert len(lines) == 5


@pytest.mark.parametrize("width", [1, 30, 50, 60, 79, 80, 100, 200])
@pytest.mark.parametrize("height", [1, 5, 24])
def test_it_fits_the_terminal(width, height):
    lines, _ = drawn(VIEW, width, height)
    assert max(map(len, lines)) < max(2, width)
    assert len(lines) <= max(height, 3)
    titles = " ".join(lines)
    assert width < 60 or all(name in titles for name in ("coda", "source_10" if width >= 79 else "to so"))
    left_out = 3 - sum(line.startswith(("adapt", "evaluate", "profiles")) for line in lines)
    assert width < 50 or any(f"{left_out} more running" in line for line in lines) == bool(left_out)


def test_colours_are_the_terminals_choice():
    _, plain = drawn(VIEW, no_color=True, color_system="truecolor")
    _, coloured = drawn(VIEW, color_system="truecolor")
    assert "\x1b[38;2" not in plain
    assert "\x1b[38;2" in coloured


def test_brackets_in_a_title_are_no_markup():
    lines, _ = drawn(View((Row("adapt to [bold]b[/]", 1, 2, 1.0, 1.0),), 0, 0, 1, {}, None, False))
    assert lines[0].startswith("adapt to [bold]b[/] ")


def test_titles_keep_both_ends():
    for width in range(1, len(BATCH)):
        short = shortened(BATCH, width)
        head, cut, tail = short.partition("…")
        assert cut
        assert len(short) <= width
        assert BATCH.startswith(head)
        assert BATCH.endswith(tail)
        assert len(head) >= len(tail)
    assert shortened(BATCH, len(BATCH)) == BATCH


def test_durations():
    assert [duration(s) for s in (0, 59.6, 61, 3599, 3600, 36_660)] == ["0:00", "1:00", "1:01", "59:59", "1 h 00", "10 h 11"]


@pytest.fixture
def quiet_tally(monkeypatch):
    """No Ray: stages tell what is put into the list that this gives, and the first ends when nothing more is told."""
    news = []

    class Told:
        def news(self):
            return dict([news.pop(0)]) if news else {}

        def teller(self, key):
            return f"tells of {key}"

    monkeypatch.setattr(display, "Tally", Told)
    monkeypatch.setattr(ray, "wait", lambda references, **options: ([] if news else references[:1], []))
    return news


def test_lines_scroll_above_the_bars_and_nothing_stays_behind(quiet_tally, monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    console = Console(force_terminal=True, width=80, height=24, color_system=None, _environ={})
    shown = LiveDisplay(Standing(STAGES, (), 2), console)
    quiet_tally += [(LEARN.key, (0, 100)), (LEARN.key, (40, 100))]

    def interrupted():
        with shown:
            assert shown.teller(LEARN) == f"tells of {LEARN.key}"
            assert shown.wait(["a", "b"]) == "a"
            print("a line of a worker", file=sys.stderr)
            console.print("a line of the job")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    written = terminal.getvalue()
    assert "40/100" in written
    assert written.index(HIDE) < written.index("pretrain")
    assert written.rindex(SHOW) > written.rindex("pretrain")
    assert screen(written) == ["a line of a worker", "a line of the job"]
    assert sys.stdout is terminal


def test_the_picture_follows_ends_and_failures(quiet_tally):
    console = Console(force_terminal=True, width=80, file=io.StringIO())
    shown = LiveDisplay(Standing(STAGES, {LEARN.key}, 2), console)
    quiet_tally.append((ADAPT.key, (0, 0)))
    shown.wait(["a"])
    assert [row.title for row in shown._view.rows] == ["adapt"]
    shown.ended(ADAPT, failed=True)
    assert (shown._view.rows, shown._view.failed) == ((), 1)


@pytest.fixture
def chosen(quiet_tally, monkeypatch):
    """Give the kind of display that is chosen where standard output is a file or a terminal."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(display, "room", lambda train: 2)
    monkeypatch.setattr(display, "get_console", Console)

    def choose(output, finished=()):
        monkeypatch.setattr(sys, "stdout", output)
        return type(display_of(STAGES, finished, Train()))

    return choose


def test_a_terminal_gets_it_while_something_is_left_to_do(chosen, monkeypatch):
    ours, theirs = pty.openpty()
    with os.fdopen(ours), os.fdopen(theirs, "w") as terminal:
        assert chosen(terminal) is LiveDisplay
        assert chosen(terminal, [stage.key for stage in STAGES]) is Display
        monkeypatch.setenv("TERM", "dumb")
        assert chosen(terminal) is Display


def test_pipes_and_files_do_not_even_where_colours_are_forced(chosen, monkeypatch):
    assert chosen(io.StringIO()) is Display
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert chosen(io.StringIO()) is Display


@pytest.fixture
def on_a_terminal(monkeypatch):
    """Run something on a terminal of 80 columns; give what was written there."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    # However fast a stage is, it is seen.
    monkeypatch.setattr(display, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(display, "REDRAWN_PER_S", 100)

    def run(what):
        ours, theirs = pty.openpty()
        chunks = []

        def read():
            with suppress(OSError):  # the other end is closed
                while chunk := os.read(ours, 65536):
                    chunks.append(chunk)

        reader = threading.Thread(target=read)
        reader.start()
        with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", terminal)
            console = Console()
            for module in (display, progress):
                patch.setattr(module, "get_console", lambda: console)
            what()
        reader.join()
        os.close(ours)
        return b"".join(chunks).decode()

    return run


@pytest.mark.slow
@pytest.mark.parametrize("dead", [False, True])
def test_a_small_matrix_on_a_terminal(ray_cluster, tmp_path, monkeypatch, on_a_terminal, dead):
    config = small_config(tmp_path)
    for source in ("a", "b"):
        write_tiles(config, source, batches=2)
    if dead:
        make = display.Tally
        monkeypatch.setattr(display, "Tally", lambda: killed(make()))
    request = Request("a", "b", "supervised", "source", 0)
    written = on_a_terminal(lambda: run_job(config, [request], kind="adapt", name="small"))
    assert written.index(HIDE) < written.index("of 2 stages finished") < written.rindex(SHOW)
    assert bool(re.search(r"classify supervised on a, seed 0 .*\d/4 ", written)) != dead
    lines = screen(written)
    assert lines[:3] == [
        "2 stages, 0 of them finished before",
        "[1/2] classify supervised on a, seed 0",
        "[2/2] evaluate classify supervised on a, seed 0 on b",
    ]
    assert not any("━━━━━━━━━━" in line or "waiting" in line for line in lines[:4])
    assert any(line.startswith("transfers: ") for line in lines[4:])


def killed(tally):
    ray.kill(tally.actor)
    return tally


def test_elsewhere_stages_print_for_themselves(monkeypatch):
    waited = []
    monkeypatch.setattr(ray, "wait", lambda references, **options: waited.append(options) or (references[:1], []))
    with Display() as shown:
        assert shown.teller(LEARN) is None
        assert shown.wait(["a", "b"]) == "a"
        shown.ended(LEARN, failed=False)
    assert waited == [{"num_returns": 1}]
