"""A plate's picture shows every well where it is."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from coda_ray.tracking.figures import figure_png
from coda_ray.tracking.plate_figures import EMPTY, OTHERS, UNKNOWN, plate_figure
from coda_ray.tracking.report_figures import PALETTE


def wells(names, predicted):
    values = np.linspace(0, 1, len(names))
    told = {"predicted": predicted, "confidence": values, "image_agreement": values, "replicate_agreement": values}
    return pd.DataFrame({"Metadata_Well": names, **told})


def panels(figure):
    return {panel.get_title().partition(":")[0]: panel for panel in figure.axes if panel.get_title()}


def test_every_well_is_in_its_place():
    table = wells(["A01", "B07", "P24", "unknown"], ["x", "y", "y", "x"])
    table.loc[1, "replicate_agreement"] = np.nan
    figure = plate_figure(table, "one plate")
    assert figure.get_suptitle() == "one plate (1 wells without a place on the grid)"
    shown = panels(figure)
    assert len(shown) == 4
    for panel in shown.values():
        assert (panel.get_xlim(), panel.get_ylim()) == ((0, 24), (16, 0))
    texts = {text.get_position(): text.get_text() for text in shown["predicted mechanism"].texts}
    assert texts == {(0.5, 0.5): "2", (6.5, 1.5): "1", (23.5, 15.5): "1"}
    background, mesh = shown["replicates"].collections
    values = np.ma.filled(mesh.get_array(), -1).reshape(16, 24)
    assert values[15, 23] == pytest.approx(2 / 3)
    assert (values >= 0).sum() == 2
    colours = background.get_array().reshape(16, 24, 3)
    assert to_hex(colours[1, 6]) == to_hex(UNKNOWN)
    assert to_hex(colours[3, 3]) == to_hex(EMPTY)
    (listed,) = [text.get_text() for panel in figure.axes for text in panel.texts if "(1)" in text.get_text()]
    assert listed == "2  x (1)"


def test_the_most_frequent_classes_have_the_colours_and_larger_plates_larger_grids():
    names = [f"AF{number:02d}" for number in range(1, 13)]
    figure = plate_figure(wells(names, [f"moa {min(number, 9)}" for number in range(12)]), "large")
    panel = panels(figure)["predicted mechanism"]
    assert panel.get_ylim() == (32, 0)
    colours = panel.collections[1].get_array().reshape(32, 24, 3)[31]
    assert to_hex(colours[11]) == to_hex(PALETTE[0])
    assert to_hex(colours[8]) == to_hex(OTHERS)
    assert [tick.get_text() for tick in panel.get_yticklabels()][25:28] == ["Z", "AA", "AB"]


def test_a_plate_without_a_well_has_a_picture_too():
    assert figure_png(plate_figure(wells([], []), "empty")).startswith(b"\x89PNG")
