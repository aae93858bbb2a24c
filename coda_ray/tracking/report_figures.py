"""The pictures of a report, as in the CODA paper: for print, and for readers with any colour vision."""

import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from coda_ray.tracking.figures import COLOURS
from coda_ray.tracking.findings import POOLED, Example, FeatureMap, LayerComparison
from coda_ray.tracking.published import published_cells
from coda_ray.tracking.table import cells_of, seeds_text, shown, title_of

# Okabe and Ito (2008), "Color universal design": told apart with any colour vision; without their yellow, too pale on white.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "*")
HATCHES = ("", "///", "...", "xx", "\\\\\\", "--", "++", "OO", "**")
PAGE_INCHES = 11.0
DPI = 150
# Half of the range of a self-normalised channel that is shown.
SHOWN_STD = 2.5
LEGEND_COLUMNS = 4
# Granularities in the order of a figure, from large to small.
GRANULARITIES = ("source", "batch", "plate")


class Style(NamedTuple):
    """How one category is drawn."""

    colour: str
    marker: str
    hatch: str


def styles(names: Sequence[str]) -> dict[str, Style]:
    """Give up to 63 categories a colour with a marker of its own."""
    found = {}
    for i, name in enumerate(names):
        colour, turn = i % len(PALETTE), i // len(PALETTE)
        mark = (colour + turn) % len(MARKERS)
        found[name] = Style(PALETTE[colour], MARKERS[mark], HATCHES[mark])
    return found


def figure_svg(figure: Figure) -> bytes:
    """Render a figure as SVG, the same bytes each time."""
    sink = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "coda_ray"}):
        figure.savefig(sink, format="svg", metadata={"Date": None})
    return sink.getvalue()


def example_figure(examples: Sequence[Example]) -> Figure:
    """Draw example tiles of each source: as prepared above, self-normalised below, with a scale bar (figure 3)."""
    columns = max(len(example.raw) for example in examples)
    side = min(2.0, PAGE_INCHES / columns)
    figure = _figure(columns * side + 1.1, 2 * len(examples) * (side + 0.18) + 0.5)
    panels = figure.subplots(2 * len(examples), columns, squeeze=False)
    for number, example in enumerate(examples):
        normalised = np.clip(0.5 + example.normalised / (2 * SHOWN_STD), 0, 1)
        for offset, (name, tiles) in enumerate((("as prepared", example.raw / 255), ("self-normalised", normalised))):
            row = panels[2 * number + offset]
            for place, panel in enumerate(row):
                panel.set(xticks=[], yticks=[])
                if place >= len(tiles):
                    panel.set_axis_off()
                    continue
                panel.imshow(_rgb(tiles[place]), interpolation="nearest")
                if not offset:
                    panel.set_title(example.compounds[place], fontsize=7)
                _scale_bar(panel, tiles.shape[-1], example.pixel_size_um)
            row[0].set_ylabel(f"{example.source}\n{name}", fontsize=8)
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
    cells, published, look = cells_of(tidy), published_cells(tidy), styles(methods)
    figure = _figure(min(PAGE_INCHES, 2.5 + 0.22 * len(targets) * (len(methods) + 1)), 2.3 * len(sources) + 1.0)
    panels = figure.subplots(len(sources), 1, squeeze=False, sharey=True)[:, 0]
    width = 0.84 / len(methods)
    for source, panel in zip(sources, panels, strict=True):
        for number, method in enumerate(methods):
            places = np.arange(len(targets)) + (number - (len(methods) - 1) / 2) * width
            values = 100 * np.array([cells.get((source, t, method), (math.nan, math.nan)) for t in targets])
            style = look[method]
            panel.bar(places, values[:, 0], width, label=method, color=style.colour, hatch=style.hatch, edgecolor="white", lw=0.5)
            spread = np.isfinite(values[:, 1])
            panel.errorbar(places[spread], values[spread, 0], values[spread, 1], fmt="none", ecolor="0.25", capsize=2, lw=1)
            printed = 100 * np.array([published.get((source, t, method), (math.nan,))[0] for t in targets])
            panel.plot(places, printed, "D", ms=4, color="white", mec="black", ls="none", label="_paper", zorder=3)
        names = [f"{target}\n(held-out plate)" if target == source else target for target in targets]
        panel.set_xticks(range(len(targets)), names, fontsize=8)
        panel.set(ylabel="%", ylim=(0, None))
        panel.set_title(f"trained on {source}", fontsize=9, loc="left")
        _plain_frame(panel)
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
        A panel per source and target; filled: scored on the unit itself, hollow: on the whole target.
    """
    pairs = [(s, t) for s in shown(table["source"].tolist()) for t in shown(table["target"].tolist())]
    pairs = [pair for pair in pairs if ((table["source"] == pair[0]) & (table["target"] == pair[1])).any()]
    methods, levels = shown(table["method"].tolist()), [g for g in GRANULARITIES if g in set(table["granularity"])]
    columns = min(4, len(pairs))
    rows = math.ceil(len(pairs) / columns)
    figure = _figure(2.6 * columns + 1.4, 2.4 * rows + 1.2)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    look = styles(methods)
    for panel, pair in zip(panels, pairs, strict=False):
        of_pair = table[(table["source"] == pair[0]) & (table["target"] == pair[1])]
        for number, method in enumerate(methods):
            shift = (number - (len(methods) - 1) / 2) * 0.5 / len(methods)
            for scope, line, fill in (("adapted", "-", look[method].colour), ("whole", "--", "white")):
                one = of_pair[(of_pair["method"] == method) & (of_pair["scope"] == scope)].set_index("granularity")
                one = one.reindex(levels)
                places, spread = np.arange(len(levels)) + shift, 100 * one["std"].fillna(0.0)
                panel.errorbar(
                    places, 100 * one["mean"], spread, fmt=look[method].marker, ls=line, lw=1, ms=5, color=look[method].colour,
                    mfc=fill, capsize=2, label=method if scope == "adapted" else "_",
                )  # fmt: skip
        panel.set_title(f"{pair[0]} → {pair[1]}", fontsize=9)
        panel.set_xticks(range(len(levels)), levels)
        panel.set(xlabel="adapted per", xlim=(-0.5, len(levels) - 0.5))
        _plain_frame(panel)
    for panel in panels[len(pairs) :]:
        panel.set_axis_off()
    for panel in panels[::columns]:
        panel.set_ylabel("accuracy (%)")
    panels[0].plot([], [], "o-", color="0.3", label="scored on the unit")
    panels[0].plot([], [], "o--", color="0.3", mfc="white", label="scored on the whole target")
    _legend(figure, panels[0])
    held_out = ", compounds held out" if table["split"].iloc[0] == "compounds" else ""
    figure.suptitle(f"Accuracy by granularity{held_out}, mean ± std over {seeds_text(table)}", fontsize=11)
    return figure


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
        for pooled, marker, colour in ((False, "o", PALETTE[0]), (True, "D", PALETTE[5])):
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
    held_out = ", compounds held out" if split == "compounds" else ""
    figure.supxlabel("difference in accuracy (points)", fontsize=9)
    title = f"Paired differences{held_out}, adapted per {granularity}: mean over {seeds_text(part)}, 95 % interval over wells"
    figure.suptitle(title, fontsize=10)
    return figure


def map_figure(found: FeatureMap) -> Figure:
    """Draw embeddings before and after adaptation, by mechanism above and by batch below (figure 5)."""
    figure = _figure(PAGE_INCHES, PAGE_INCHES * 0.82)
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    for row, column in enumerate(("moa", "batch")):
        names = sorted(found.frame[column].dropna().unique())
        look = styles(names)
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
        f"{found.source} → {found.target}: CLS embeddings of {tiles:,} tiles, one UMAP for both states, 1 seed", fontsize=11
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
    figure.suptitle(f"{found.title}, 1 seed", fontsize=11)
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
    panel.text(
        pad + width / 2,
        side - 1.9 * pad,
        f"{length:g} µm",
        color="white",
        fontsize=6,
        ha="center",
        va="bottom",
        fontweight="bold",
    )
