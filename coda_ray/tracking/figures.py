"""Figures of results. They are built with matplotlib's objects, so that they can be drawn in any thread."""

import io
import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from coda_ray.tracking.table import cell_text, cells_of, matrices, shown, title_of

COLOURS = "viridis"  # even in lightness: reads in grey print and with any colour vision
CELL_INCHES = (0.95, 0.62)
PAGE_INCHES = 13.0
# The scores that are drawn; all are in the table.
DRAWN = ("accuracy", "macro_f1")


def matrix_figures(tidy: pd.DataFrame) -> dict[str, Figure]:
    """Draw the matrices of a job.

    Parameters
    ----------
    tidy
        From `table.job_matrix`.

    Returns
    -------
    dict
        `matrix-<metric>-<granularity>` (and `-compounds` where they are held out) to figure, for accuracy and macro-F1.
    """
    return {_name(part): matrix_heatmap(part) for metric in DRAWN for part in matrices(tidy, metric)}


def matrix_heatmap(tidy: pd.DataFrame) -> Figure:
    """Draw a matrix: one panel per method, source by target, on one colour scale from zero.

    Parameters
    ----------
    tidy
        One metric at one granularity, from `table.matrix_table`, with at least one row.

    Returns
    -------
    Figure
        Percent, mean and standard deviation over seeds in each cell; cells that were not scored are grey.
    """
    sources, targets, methods = (shown(tidy[name].tolist()) for name in ("source", "target", "method"))
    width, height = len(targets) * CELL_INCHES[0] + 1.1, len(sources) * CELL_INCHES[1] + 0.9
    rows = math.ceil(len(methods) / max(2, int(PAGE_INCHES / width)))
    columns = math.ceil(len(methods) / rows)
    figure = Figure(figsize=(max(columns * width + 1.0, 6.5), rows * height + 0.7), dpi=150, layout="constrained")
    scale = Normalize(0.0, 100 * max(float(tidy["mean"].max()), 0.01))
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for number, panel in enumerate(panels):
        if number < len(methods):
            cells = {(s, t): values for (s, t, m), values in cells_of(tidy).items() if m == methods[number]}
            _panel(panel, cells, sources, targets, scale)
            panel.set_title(methods[number], fontsize=10, fontweight="bold")
        else:
            panel.set_axis_off()
    figure.colorbar(ScalarMappable(scale, COLOURS), ax=panels.tolist(), label="%", fraction=0.03, pad=0.01)
    figure.suptitle(title_of(tidy), fontsize=11)
    return figure


def figure_png(figure: Figure) -> bytes:
    """Render a figure as PNG."""
    sink = io.BytesIO()
    figure.savefig(sink, format="png")
    return sink.getvalue()


def _name(tidy: pd.DataFrame) -> str:
    """Name the picture of one matrix."""
    metric, split, granularity = (tidy[name].iloc[0] for name in ("metric", "split", "granularity"))
    return f"matrix-{metric}-{granularity}" + ("" if split == "plate" else f"-{split}")


def _panel(
    panel: Axes,
    cells: dict[tuple[str, str], tuple[float, float]],
    sources: list[str],
    targets: list[str],
    scale: Normalize,
) -> None:
    """Draw one method."""
    none = (math.nan, math.nan)
    means = np.array([[100 * cells.get((s, t), none)[0] for t in targets] for s in sources])
    panel.set_facecolor("0.92")
    mesh = panel.pcolormesh(np.ma.masked_invalid(means), norm=scale, cmap=COLOURS, edgecolors="white", linewidth=1.5)
    for (y, x), mean in np.ndenumerate(means):
        text = cell_text(*cells.get((sources[y], targets[x]), none)).replace(" ± ", "\n± ")
        dark = math.isfinite(mean) and luminance(mesh.to_rgba(mean)) < 0.5
        panel.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=9, color="white" if dark else "black")
    panel.set_xticks(np.arange(len(targets)) + 0.5, targets, fontsize=9)
    panel.set_yticks(np.arange(len(sources)) + 0.5, sources, fontsize=9)
    panel.set(xlabel="target", ylabel="source", xlim=(0, len(targets)), ylim=(len(sources), 0))
    panel.tick_params(length=0)


def luminance(colour: object) -> float:
    """Perceived lightness of a colour in [0, 1] (ITU-R BT.601 weights)."""
    red, green, blue = np.asarray(colour, dtype=float)[:3]
    return float(0.299 * red + 0.587 * green + 0.114 * blue)
