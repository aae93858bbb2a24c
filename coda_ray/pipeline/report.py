"""What a person sees of a job: progress, tables, where the results are, and an exit code."""

import re
import shlex
import signal
import sys
from collections.abc import Sequence

import pandas as pd
from rich.console import Console
from rich.table import Table

from coda_ray.cluster import start_ray
from coda_ray.config import Config, ConfigError, told_in_one_line
from coda_ray.pipeline.matrix import Outcome, StagesFailedError, run_transfers
from coda_ray.pipeline.request import Model, Request
from coda_ray.pipeline.sweep import run_sweep
from coda_ray.pipeline.trial import ORACLE
from coda_ray.progress import job_console
from coda_ray.storage import open_place
from coda_ray.tracking.records import score_name
from coda_ray.tracking.table import matrices, ranking, render_matrix, render_ranking

# Columns where the output is no terminal.
WIDTH = 150
# Transfers that are worth a row each on the screen.
MOST_ROWS = 60
SHORT = {
    "accuracy": "acc",
    "macro_f1": "F1",
    "well_accuracy": "well acc",
    "compound_accuracy": "cpd acc",
}


def run_job(config: Config, requests: Sequence[Request], *, kind: str, name: str, model: Model | None = None) -> int:
    """Run a job to its exit code.

    Parameters
    ----------
    config
        Settings.
    requests
        Cells of the matrix.
    kind, name
        What the job is called.
    model
        An imported model, which all requests start from.

    Returns
    -------
    int
        0.

    Raises
    ------
    SystemExit
        With code 1 when stages failed, with code 2 when the tiles cannot be used as configured.
    """
    console = job_console(WIDTH)
    with told_in_one_line(sys.argv[0], StagesFailedError):
        start_ray()
        try:
            outcome = run_transfers(
                config,
                requests,
                kind=kind,
                name=name,
                model=model,
                command=shlex.join(["python", *sys.argv]),
                say=lambda line: console.print(line, markup=False, highlight=False),
            )
        except FileNotFoundError as error:  # tiles that are not there
            raise ConfigError(str(error)) from error
        _show(console, config, outcome)
    return 0


def _show(console: Console, config: Config, outcome: Outcome) -> None:
    """Print the tables and where everything is."""
    if 0 < len(outcome.transfers) <= MOST_ROWS:
        console.print(transfers_table(outcome.transfers))
    if len(outcome.matrix):
        for part in matrices(outcome.matrix, "accuracy"):
            console.print(render_matrix(part))
        for part in ranking(outcome.matrix):
            console.print(render_ranking(part))
    for title, address in outcome.unscored.items():
        console.print(f"no MoA labels, so no score: {title}: {address}", soft_wrap=True, highlight=False)
    results = open_place(config.results)
    console.print(f"transfers: {results.address('transfers.parquet')}", soft_wrap=True, highlight=False)
    for address in outcome.heatmaps:
        console.print(f"heat map:  {address}", soft_wrap=True, highlight=False)
    if outcome.ui_hint:
        console.print(f"MLflow:    {outcome.ui_hint}", soft_wrap=True, highlight=False)


def run_tune(config: Config, command: str) -> int:
    """Run a sweep to its exit code.

    Parameters
    ----------
    config
        Settings.
    command
        The command line.

    Returns
    -------
    int
        0; 1 when trials failed; 130 after Ctrl-C or SIGTERM.

    Raises
    ------
    SystemExit
        With code 1 when what trials stand on failed, with code 2 when the space or the tiles cannot be used as configured.
    """
    console = job_console(WIDTH)
    with told_in_one_line(sys.argv[0], StagesFailedError):
        start_ray()
        # `ray job stop` ends it as Ctrl-C does; Ray has set a handler of its own by now, and Tune sets another for Ctrl-C.
        signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as shells start what runs in the background
            signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            outcome = run_sweep(config, command, lambda line: console.print(line, markup=False, highlight=False))
        except FileNotFoundError as error:  # tiles that are not there
            raise ConfigError(str(error)) from error
    console.print(trials_table(outcome.table, config))
    for address in outcome.files:
        console.print(address, soft_wrap=True, highlight=False)
    if outcome.best and outcome.table["status"].iloc[0] == "unadapted":
        console.print(
            f"by {config.tune.objective} the unadapted model is better than every trial: adapt nothing, or search elsewhere"
        )
    adapt = shlex.join(re.sub(r"\btune\.py$", "adapt.py", word) for word in shlex.split(command))
    for options in outcome.best:
        console.print(f"the best: {adapt} {options}", soft_wrap=True, markup=False, highlight=False)
    if outcome.ui_hint:
        console.print(f"MLflow: {outcome.ui_hint}", soft_wrap=True, highlight=False)
    if not outcome.whole:
        console.print("the sweep is not finished; the same command again continues it")
        return 130
    return int((outcome.table["status"] == "failed").any())


def trials_table(trials: pd.DataFrame, config: Config) -> Table:
    """Lay out a sweep, the best trial first."""
    settings = config.tune
    seeds, name = int(trials["n_seeds"].max()), score_name(settings.objective)
    table = Table(title=f"trials by {settings.objective}, mean ± standard deviation over {seeds} seed(s); {ORACLE} reads labels")
    for column in ("#", *settings.space, "status", "step", settings.objective, ORACLE):
        table.add_column(column, overflow="fold")
    for place, row in enumerate(trials.head(MOST_ROWS).to_dict("records"), 1):
        values = [
            "–" if pd.isna(row[field]) else f"{row[field]:.4g}" if isinstance(row[field], float) else str(row[field])
            for field in settings.space
        ]
        spread = "" if pd.isna(row[f"{name}_std"]) else f" ± {row[f'{name}_std']:.4f}"
        score = "–" if pd.isna(row[name]) else f"{row[name]:.4f}{spread}"
        oracle = "–" if pd.isna(row[ORACLE]) else f"{100 * row[ORACLE]:.1f}"
        status = row["status"] if row["status"] != "failed" else f"failed: {row['reason']}"
        table.add_row(str(place), *values, status, "–" if pd.isna(row["step"]) else str(int(row["step"])), score, oracle)
    return table


def transfers_table(transfers: pd.DataFrame) -> Table:
    """Lay out transfers row by row, scores in percent."""
    table = Table(title="transfers: accuracy and macro-F1 per image, accuracy per well and per compound (cpd), in percent")
    names = ["source", "target", "method", "granularity", "unit", "scope", "split", "seed", "n_images"]
    for column in [*names, *SHORT, "steps"]:
        table.add_column(SHORT.get(column, column), overflow="fold")
    for row in transfers.to_dict("records"):
        scores = [f"{100 * row[column]:.1f}" for column in SHORT]
        table.add_row(*[str(row[column]) for column in names], *scores, str(row["steps"]))
    return table
