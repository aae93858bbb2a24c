"""The drift of plates as they arrived."""

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from coda_ray.tracking.report_figures import BLUE, GREY, RED, SKY

PLATE_INCHES, LEAST_INCHES, MOST_INCHES = 0.3, 6.0, 40.0
# Plates beyond which their names cannot be read.
MOST_NAMED = 120


def drift_figure(plates: pd.DataFrame) -> Figure:
    """Draw how far each plate is from the source and from the nearest unit that is known, in the order of arrival.

    Parameters
    ----------
    plates
        One row per plate: plate, state, drift_source, drift_nearest, threshold (missing where not measured), granularity.

    Returns
    -------
    Figure
        A mark for each plate; filled where an adapted model predicts it, a cross where the plate was set aside.
    """
    width = min(MOST_INCHES, max(LEAST_INCHES, PLATE_INCHES * len(plates) + 1.5))
    figure = Figure(figsize=(width, 3.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    places = pd.Series(range(1, len(plates) + 1), index=plates.index, dtype=float)
    adapted = plates["granularity"].isin(["plate", "batch"])
    _nearest(axes, places, plates["drift_nearest"].astype(float), adapted)
    far = plates["drift_source"].astype(float).dropna()
    axes.plot(places[far.index], far, color=GREY, marker="s", markersize=4, label="from the source", lw=1)
    threshold = plates["threshold"].astype(float).ffill().bfill()
    axes.plot(places, threshold, color=RED, linestyle="--", lw=1, label="threshold")
    aside = places[plates["state"] == "aside"]
    if len(aside):
        axes.plot(aside, [0.0] * len(aside), color=RED, marker="x", linestyle="", clip_on=False, label="set aside")
    if len(plates) <= MOST_NAMED:
        axes.set_xticks(places, plates["plate"], rotation=90, fontsize=7)
    axes.set(ylabel="drift (std of the source)", ylim=(0, None), xlim=(0.5, max(1, len(plates)) + 0.5))
    axes.set_title("drift of DMSO images, plates in the order of arrival", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def _nearest(axes: Axes, places: "pd.Series[float]", drift: "pd.Series[float]", adapted: "pd.Series[bool]") -> None:
    """Draw the distance to the nearest unit: open marks for the source's model, filled ones for adapted ones."""
    kinds = ((~adapted, "white", "from the nearest unit"), (adapted, SKY, "the same, predicted by an adapted model"))
    for chosen, face, label in kinds:
        if chosen.any():
            style: dict[str, Any] = {"color": BLUE, "marker": "o", "markerfacecolor": face, "markersize": 9, "linestyle": ""}
            axes.plot(places[chosen], drift[chosen], label=label, **style)
