"""The pictures of a report, as in the CODA paper: for print, and for readers with any colour vision."""

import io
import math
from collections.abc import Sequence
from typing import Any, get_args

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from coda_ray.config import Granularity
from coda_ray.methods import PER_UNIT, ROWS, Style
from coda_ray.tracking.figures import COLOURS
from coda_ray.tracking.findings import POOLED, Example, FeatureMap, LayerComparison
from coda_ray.tracking.published import published_cells
from coda_ray.tracking.table import OF_SPLIT, TITLES, cells_of, seeds_text, shown, title_of

# Okabe and Ito (2008), "Color universal design": told apart with any colour vision; without their yellow, too pale on white.
BLUE, ORANGE, GREEN, PINK, SKY, RED, BLACK = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000"
GREY = "#7F7F7F"
PALETTE = (BLUE, ORANGE, GREEN, PINK, SKY, RED, BLACK)
NAMED = dict(zip(("blue", "orange", "green", "pink", "sky", "red", "black", "grey"), (*PALETTE, GREY), strict=True))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "*")
PAGE_INCHES = 11.0
DPI = 150
# Of the methods that adapt to no unit.
LINES: tuple[Any, ...] = (":", "-.", (0, (1, 3)), (0, (6, 2)), (0, (3, 1, 1, 1, 1, 1)))
# Half of the range of a self-normalised channel that is shown.
SHOWN_STD = 2.5
LEGEND_COLUMNS = 4


STYLES = {row.name: row.style._replace(colour=NAMED[row.style.colour]) for row in ROWS}


def category_styles(names: Sequence[str]) -> dict[str, Style]:
    """Give up to 63 categories a colour with a marker of its own."""
    size = len(PALETTE)
    return {name: Style(PALETTE[i % size], MARKERS[(i % size + i // size) % len(MARKERS)]) for i, name in enumerate(names)}


def figure_svg(figure: Figure) -> bytes:
    """Render a figure as SVG, the same bytes each time."""
    sink = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "coda_ray"}):
        figure.savefig(sink, format="svg", metadata={"Date": None})
    return sink.getvalue()


def example_figure(examples: Sequence[Example]) -> Figure:
    """Draw example tiles of each source, as prepared and beside it as self-normalised, with scale bars (figure 3)."""
    columns = max(len(example.raw) for example in examples)
    side = min(2.0, PAGE_INCHES / (2 * columns))
    figure = _figure(2 * columns * side + 0.6, len(examples) * (side + 0.2) + 0.6)
    grid = figure.add_gridspec(len(examples), 2 * columns + 1, width_ratios=[1] * columns + [0.1] + [1] * columns)
    for row, example in enumerate(examples):
        normalised = np.clip(0.5 + example.normalised / (2 * SHOWN_STD), 0, 1)
        for half, (name, tiles) in enumerate((("as prepared", example.raw / 255), ("self-normalised", normalised))):
            for place, (tile, compound) in enumerate(zip(tiles, example.compounds, strict=True)):
                panel = figure.add_subplot(grid[row, half * (columns + 1) + place])
                panel.imshow(_rgb(tile), interpolation="nearest")
                panel.set(xticks=[], yticks=[])
                panel.set_title(compound if row or place else f"{name}\n{compound}", fontsize=6, pad=2)
                _scale_bar(panel, tile.shape[-1], example.pixel_size_um)
                if not half and not place:
                    panel.set_ylabel(example.source, fontsize=9)
    colours = ", ".join(f"{colour}: {name}" for colour, name in zip(("red", "green", "blue"), examples[0].channels, strict=False))
    figure.suptitle(f"Example tiles ({colours})", fontsize=11)
    return figure


def bar_figure(tidy: pd.DataFrame) -> Figure:
    """Draw a matrix as bars: a panel per source, a group per target, a bar per method (figure 7).

    Parameters
    ----------
    tidy
        One metric at one split and granularity, from `table.matrix_table`.

    Returns
    -------
    Figure
        Percent; whiskers are the standard deviation over seeds, diamonds what the paper printed.
    """
    sources, targets, methods = (shown(tidy[name].tolist()) for name in ("source", "target", "method"))
    cells, published = cells_of(tidy), published_cells(tidy)
    figure = _figure(min(PAGE_INCHES, 2.5 + 0.22 * len(targets) * (len(methods) + 1)), 2.3 * len(sources) + 1.0)
    panels = figure.subplots(len(sources), 1, squeeze=False, sharey=True)[:, 0]
    width = 0.84 / len(methods)
    for source, panel in zip(sources, panels, strict=True):
        own = [target for target in targets if any((source, target, method) in cells for method in methods)]
        for number, method in enumerate(methods):
            places = np.arange(len(own)) + (number - (len(methods) - 1) / 2) * width
            values = 100 * np.array([cells.get((source, t, method), (math.nan, math.nan)) for t in own])
            style = STYLES[method]
            panel.bar(places, values[:, 0], width, label=method, color=style.colour, hatch=style.hatch, edgecolor="white", lw=0.5)
            spread = np.isfinite(values[:, 1])
            panel.errorbar(places[spread], values[spread, 0], values[spread, 1], fmt="none", ecolor="0.25", capsize=2, lw=1)
            printed = 100 * np.array([published.get((source, t, method), (math.nan,))[0] for t in own])
            panel.plot(places, printed, "D", ms=4, color="white", mec="black", ls="none", label="_paper", zorder=3)
        names = [f"{target}\n(held-out plate)" if target == source else target for target in own]
        panel.set_xticks(range(len(own)), names, fontsize=8)
        panel.set(ylabel=f"{TITLES[tidy['metric'].iloc[0]]} (%)", xlim=(-0.5, len(targets) - 0.5))
        panel.set_title(f"trained on {source}", fontsize=9, loc="left")
        _plain_frame(panel)
    # After the last panel: a limit that is set holds for all of them, and stops following what is drawn.
    panels[0].set_ylim(bottom=0)
    if published:
        panels[0].plot([], [], "D", ms=4, color="white", mec="black", ls="none", label="as published")
    _legend(figure, panels[0])
    figure.suptitle(title_of(tidy), fontsize=11)
    return figure


def granularity_figure(table: pd.DataFrame) -> Figure:
    """Draw accuracy by the unit of adaptation (figure 4).

    Parameters
    ----------
    table
        One split, from `report_tables.granularity_table`.

    Returns
    -------
    Figure
        A panel per source and target; filled: scored on the unit itself, hollow: on the whole target; lines across: methods
        that adapt to no unit.
    """
    have = set(zip(table["source"], table["target"], strict=True))
    pairs = [(s, t) for s in shown(table["source"].tolist()) for t in shown(table["target"].tolist()) if (s, t) in have]
    methods, levels = shown(table["method"].tolist()), [g for g in get_args(Granularity) if g in set(table["granularity"])]
    per_unit, still = ([m for m in methods if (m in PER_UNIT) == fitted] for fitted in (True, False))
    columns = min(4, len(pairs))
    rows = math.ceil(len(pairs) / columns)
    figure = _figure(2.6 * columns + 1.4, 2.4 * rows + 1.2)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for panel, (source, target) in zip(panels, pairs, strict=False):
        of_pair = table[(table["source"] == source) & (table["target"] == target)]
        for method in methods:
            one = of_pair[of_pair["method"] == method]
            if method in per_unit:
                shift = (per_unit.index(method) - (len(per_unit) - 1) / 2) * 0.12
                _by_granularity(panel, one, method, np.arange(len(levels)) + shift, levels)
            elif len(one):
                line = LINES[still.index(method) % len(LINES)]
                panel.axhline(100 * one["mean"].iloc[0], color=STYLES[method].colour, ls=line, lw=1.2, label=method)
        panel.set_title(f"{source} → {target}", fontsize=9)
        panel.set_xticks(range(len(levels)), levels)
        panel.set_xlabel("adapted per", fontsize=9)
        panel.set_xlim(-0.5, len(levels) - 0.5)
        _plain_frame(panel)
    for panel in panels[len(pairs) :]:
        panel.set_axis_off()
    for panel in panels[::columns]:
        panel.set_ylabel("accuracy (%)", fontsize=9)
    panels[0].plot([], [], "o-", color="0.3", label="on the unit")
    panels[0].plot([], [], "o--", color="0.3", mfc="white", label="on the whole target")
    _legend(figure, panels[0])
    figure.suptitle(
        f"Accuracy by granularity{OF_SPLIT[table['split'].iloc[0]]}, mean ± std over {seeds_text(table)}", fontsize=11
    )
    return figure


def _by_granularity(panel: Axes, table: pd.DataFrame, method: str, places: NDArray[Any], levels: list[Granularity]) -> None:
    """Draw one method of one pair: on the whole target below, on the unit above it."""
    style = STYLES[method]
    for scope, line, fill in (("whole", "--", "white"), ("adapted", "-", style.colour)):
        one = table[table["scope"] == scope].set_index("granularity").reindex(levels)
        panel.errorbar(
            places, 100 * one["mean"], 100 * one["std"].fillna(0.0), fmt=style.marker, ls=line, lw=1, ms=6, color=style.colour,
            mfc=fill, capsize=2, label=method if scope == "adapted" else "_",
        )  # fmt: skip


def difference_figure(part: pd.DataFrame) -> Figure:
    """Draw paired differences with their intervals, a panel per pair of methods.

    Parameters
    ----------
    part
        `findings.DIFFERENCE_COLUMNS`, one split and granularity.
    """
    groups = list(part.groupby(["method", "against"], sort=False))
    columns = min(4, len(groups))
    rows = math.ceil(len(groups) / columns)
    targets = list(dict.fromkeys(part["target"]))
    figure = _figure(2.6 * columns + 1.2, rows * (0.26 * len(targets) + 0.8) + 0.7)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for panel, ((method, against), one) in zip(panels, groups, strict=False):
        at = [targets.index(target) for target in one["target"]]
        middle, low, high = (100 * one[name].to_numpy(float) for name in ("difference", "low", "high"))
        panel.axvline(0, color="0.6", lw=1)
        for pooled, marker, colour in ((False, "o", BLUE), (True, "D", RED)):
            chosen = (one["target"] == POOLED).to_numpy() == pooled
            places = np.array(at)[chosen]
            panel.hlines(places, low[chosen], high[chosen], color=colour, lw=2)
            panel.plot(middle[chosen], places, marker, color=colour, ms=5)
        panel.set_title(f"{method} − {against}", fontsize=9)
        panel.set_yticks(range(len(targets)), targets, fontsize=8)
        panel.set_ylim(len(targets) - 0.5, -0.5)
        panel.xaxis.set_tick_params(labelbottom=True)
        _plain_frame(panel)
    for panel in panels[len(groups) :]:
        panel.set_axis_off()
    split, granularity = part["split"].iloc[0], part["granularity"].iloc[0]
    figure.supxlabel("difference in accuracy (points)", fontsize=9)
    title = (
        f"Paired differences{OF_SPLIT[split]}, adapted per {granularity}: mean over {seeds_text(part)}, 95 % interval over wells"
    )
    figure.suptitle(title, fontsize=10)
    return figure


def map_figure(found: FeatureMap) -> Figure:
    """Draw embeddings before and after adaptation, by mechanism above and by batch below (figure 5)."""
    figure = _figure(PAGE_INCHES, PAGE_INCHES * 0.82)
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    for row, column in enumerate(("moa", "batch")):
        names = sorted(found.frame[column].dropna().unique())
        look = category_styles(names)
        for place, (state, method) in enumerate((("before", found.before), ("after", found.after))):
            panel, part = panels[row][place], found.frame[found.frame["state"] == state]
            without = part[part[column].isna()]
            if len(without):
                panel.plot(without["x"], without["y"], ".", ms=2, color="0.75", ls="none", label="no MoA", rasterized=True)
            for name in names:
                one, style = part[part[column] == name], look[name]
                panel.plot(
                    one["x"], one["y"], style.marker, ms=4, mew=0.3, mec="white", color=style.colour, ls="none", label=name,
                    rasterized=True,
                )  # fmt: skip
            panel.set_title(f"{state} adaptation ({method})", fontsize=9)
            panel.set(xticks=[], yticks=[])
            panel.set(
                xlabel="UMAP 1" if row else "", ylabel="" if place else f"by {'MoA' if column == 'moa' else 'batch'}\nUMAP 2"
            )
        fits = math.ceil((len(names) + 1) / 28)
        panels[row][1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=7, ncols=fits, frameon=False)
    tiles = int((found.frame["state"] == "before").sum())
    figure.suptitle(
        f"{found.source} → {found.target}: CLS embeddings of {tiles:,} tiles, one UMAP for both, seed {found.seed}", fontsize=11
    )
    return figure


def layer_figure(found: LayerComparison) -> Figure:
    """Draw CKA between the blocks of two feature extractors (figure 6)."""
    figure = _figure(4.1 * len(found.cka) + 1.0, 4.4)
    panels = figure.subplots(1, len(found.cka), squeeze=False)[0]
    for panel, (name, cka) in zip(panels, found.cka.items(), strict=True):
        rows, columns = cka.shape
        mesh = panel.imshow(
            cka, vmin=0, vmax=1, cmap=COLOURS, origin="lower", extent=(0.5, columns + 0.5, 0.5, rows + 0.5), aspect="equal"
        )
        panel.set_xticks(range(1, columns + 1))
        panel.set_yticks(range(1, rows + 1))
        panel.set(xlabel=f"block, {found.second}", ylabel=f"block, {found.first}")
        panel.set_title(name, fontsize=10)
    figure.colorbar(mesh, ax=panels.tolist(), label="CKA", fraction=0.03, pad=0.02)
    figure.suptitle(f"{found.title}, seed {found.seed}", fontsize=11)
    return figure


def online_figure(table: pd.DataFrame, title: str) -> Figure:
    """Draw what strategies make of plates as they arrive: accuracy plate by plate, and beside it what it cost so far.

    Parameters
    ----------
    table
        Columns strategy, seed, turn, batch, plate, accuracy, seconds_so_far.
    title
        What is compared.

    Returns
    -------
    Figure
        Means over seeds; whiskers are their standard deviation. Dotted lines part the batches.
    """
    strategies = list(dict.fromkeys(table["strategy"]))
    plates = table.drop_duplicates("turn").sort_values("turn")
    figure = _figure(min(PAGE_INCHES, 4.5 + 0.7 * len(plates)), 4.2)
    panels = figure.subplots(1, 2, width_ratios=[3, 2])
    for number, (name, style) in enumerate(category_styles(strategies).items()):
        shift = (number - (len(strategies) - 1) / 2) * 0.08
        for panel, column, factor in zip(panels, ("accuracy", "seconds_so_far"), (100, 1), strict=True):
            of_turn = factor * table[table["strategy"] == name].groupby("turn")[column].agg(["mean", "std"])
            panel.errorbar(
                of_turn.index + shift, of_turn["mean"], of_turn["std"].fillna(0.0), fmt=style.marker, ls="-", lw=1.2, ms=5,
                color=style.colour, capsize=2, label=name,
            )  # fmt: skip
    for panel in panels:
        for turn, before, batch in zip(plates["turn"][1:], plates["batch"], plates["batch"][1:], strict=False):
            if batch != before:
                panel.axvline(turn - 0.5, color="0.7", ls=":", lw=1)
        panel.set_xticks(plates["turn"], plates["plate"], fontsize=7, rotation=45, ha="right")
        _plain_frame(panel)
    panels[0].set_ylabel("accuracy (%)", fontsize=9)
    panels[1].set_ylabel("seconds of adaptation so far", fontsize=9)
    _legend(figure, panels[0])
    figure.suptitle(title, fontsize=11)
    return figure


def _figure(width: float, height: float) -> Figure:
    """Make an empty figure."""
    return Figure(figsize=(max(width, 5.5), height), dpi=DPI, layout="constrained")


def _plain_frame(panel: Axes) -> None:
    """Leave what is needed to read values."""
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=8)


def _legend(figure: Figure, panel: Axes) -> None:
    """Put one legend below all panels."""
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=LEGEND_COLUMNS, fontsize=8, frameon=False)


def _rgb(tile: NDArray[Any]) -> NDArray[Any]:
    """Make (up to 3, H, W) in [0, 1] a picture (H, W, 3); channels that are not there stay black."""
    picture = np.zeros((*tile.shape[1:], 3))
    picture[..., : len(tile)] = np.moveaxis(tile, 0, -1)
    return picture


def _scale_bar(panel: Axes, side: int, pixel_size_um: float) -> None:
    """Draw a bar of a round length, about a quarter of the tile; none where a pixel's size is not known."""
    if not math.isfinite(pixel_size_um):
        return
    wanted = side * pixel_size_um / 4
    power = 10.0 ** math.floor(math.log10(wanted))
    length = max(step * power for step in (1, 2, 5) if step * power <= wanted)
    width, pad = length / pixel_size_um, 0.05 * side
    panel.add_patch(Rectangle((pad, side - 1.6 * pad), width, 0.6 * pad, color="white", ec="black", lw=0.3))
    text = panel.text(pad, side - 1.9 * pad, f"{length:g} µm", color="white", fontsize=6, va="bottom", fontweight="bold")
    text.set_path_effects([withStroke(linewidth=1.2, foreground="black")])
