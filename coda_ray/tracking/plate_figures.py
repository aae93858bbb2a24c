"""A plate at a glance: what is predicted where, how sure, and whether replicates agree."""

import re
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from numpy.typing import NDArray

from coda_ray.tracking.figures import COLOURS, luminance
from coda_ray.tracking.report_figures import PALETTE

# Of a plate of 384 wells; a larger one has as many as its wells need.
ROWS, COLUMNS = 16, 24
OTHERS, EMPTY, UNKNOWN = "#B5B5B5", "white", "0.85"
LEGEND_COLUMNS = 5
LINE_INCHES = 0.16
DPI = 100
PANELS = {
    "confidence": "confidence: mean probability of the predicted class",
    "image_agreement": "images: share that say what their well says",
    "replicate_agreement": "replicates: share of the compound's other wells here that say the same; grey: none",
}


def plate_figure(wells: pd.DataFrame, title: str) -> Figure:
    """Draw a plate as its grid of wells, four times.

    Parameters
    ----------
    wells
        One row per well of one plate: `Metadata_Well` such as B07, `predicted`, `confidence`, `image_agreement`,
        `replicate_agreement` (NaN where there is no other well of the compound).
    title
        Above it.

    Returns
    -------
    Figure
        Predicted classes by number, the most frequent in colours that any colour vision tells apart, the others grey; the rest on
        one scale from 0 to 1, grey where not known. Wells that are no place of a grid are counted in the title.
    """
    places = wells["Metadata_Well"].map(_place)
    known = wells[places.notna()]
    row, column = (np.array([place[axis] for place in places.dropna()], dtype=np.int64) for axis in (0, 1))
    shape = max(ROWS, *(row + 1)) if len(row) else ROWS, max(COLUMNS, *(column + 1)) if len(column) else COLUMNS
    ranked = known["predicted"].value_counts().sort_index(kind="stable").sort_values(ascending=False, kind="stable")
    legend = LINE_INCHES * -(-len(ranked) // LEGEND_COLUMNS) + LINE_INCHES
    figure = Figure(figsize=(17, 12.5 + legend), dpi=DPI, layout="constrained")
    grid: Any = [["predicted", "confidence"], ["image_agreement", "replicate_agreement"], ["legend", "legend"]]
    panels = figure.subplot_mosaic(grid, height_ratios=[6, 6, legend])
    _classes(panels["predicted"], known["predicted"], ranked, row, column, shape)
    _legend(panels["legend"], ranked)
    scale = Normalize(0.0, 1.0)
    for name, told in PANELS.items():
        panel = panels[name]
        values = np.full(shape, np.nan)
        values[row, column] = known[name].to_numpy(float)
        there = np.zeros(shape, bool)
        there[row, column] = True
        _grid(panel, there, told)
        panel.pcolormesh(np.ma.masked_invalid(values), norm=scale, cmap=COLOURS, edgecolors="white", linewidth=0.8)
    figure.colorbar(ScalarMappable(scale, COLOURS), ax=[panels[name] for name in PANELS], fraction=0.02, pad=0.01)
    off = len(wells) - len(known)
    figure.suptitle(f"{title}{f' ({off} wells without a place on the grid)' if off else ''}", fontsize=13)
    return figure


def _place(well: str) -> tuple[int, int] | None:
    """Row and column, from 0, of a well such as B07 or AA12."""
    match = re.fullmatch(r"([A-Z]{1,2})0*([1-9]\d?)", well)
    if match is None:
        return None
    letters = [ord(letter) - ord("A") for letter in match[1]]
    return letters[-1] + (26 * (letters[0] + 1) if len(letters) == 2 else 0), int(match[2]) - 1


def _classes(
    panel: Axes,
    predicted: "pd.Series[str]",
    ranked: "pd.Series[int]",
    row: NDArray[np.int64],
    column: NDArray[np.int64],
    shape: tuple[int, int],
) -> None:
    """Draw the predicted classes by their numbers."""
    numbers = {name: number for number, name in enumerate(ranked.index, 1)}
    colours = [*PALETTE, *[OTHERS] * max(0, len(ranked) - len(PALETTE))]
    there = np.zeros(shape, bool)
    there[row, column] = True
    image = np.ones((*shape, 3))
    codes = predicted.map(numbers).to_numpy(int)
    image[row, column] = np.array([to_rgb(colours[code - 1]) for code in codes]).reshape(-1, 3)
    _grid(panel, there, "predicted mechanism")
    panel.pcolormesh(image, edgecolors="white", linewidth=0.8)
    for y, x, code in zip(row, column, codes, strict=True):
        ink = "white" if luminance(image[y, x]) < 0.5 else "black"
        panel.text(x + 0.5, y + 0.5, str(code), ha="center", va="center", fontsize=6, color=ink)


def _legend(panel: Axes, ranked: "pd.Series[int]") -> None:
    """List the numbers of the predicted classes, with their wells."""
    panel.set_axis_off()
    lines = [f"{number}  {name} ({count})" for number, (name, count) in enumerate(ranked.items(), 1)]
    deep = -(-len(lines) // LEGEND_COLUMNS)
    for number in range(LEGEND_COLUMNS):
        text = "\n".join(lines[number * deep : (number + 1) * deep])
        panel.text(number / LEGEND_COLUMNS, 1, text, transform=panel.transAxes, va="top", fontsize=8)


def _grid(panel: Axes, there: NDArray[np.bool_], title: str) -> None:
    """Draw the empty grid: letters, numbers, and grey where there is a well."""
    rows, columns = there.shape
    backgrounds = np.where(there[..., None], to_rgb(UNKNOWN), to_rgb(EMPTY))
    panel.pcolormesh(backgrounds, edgecolors="0.95", linewidth=0.8)
    panel.set(xlim=(0, columns), ylim=(rows, 0), aspect="equal")
    panel.set_xticks(np.arange(columns) + 0.5, [str(number) for number in range(1, columns + 1)], fontsize=7)
    panel.set_yticks(np.arange(rows) + 0.5, [_letters(number) for number in range(rows)], fontsize=7)
    panel.tick_params(length=0)
    panel.set_title(title, fontsize=10)


def _letters(row: int) -> str:
    """Name a row: A to Z, then AA."""
    return chr(ord("A") + row) if row < 26 else f"{chr(ord('A') + row // 26 - 1)}{chr(ord('A') + row % 26)}"
