import numpy as np
import pandas as pd
import pytest

from coda_ray.methods import NAMES
from coda_ray.tracking.findings import Example
from coda_ray.tracking.records import transfers_frame
from coda_ray.tracking.report_figures import (
    STYLES,
    bar_figure,
    category_styles,
    difference_figure,
    example_figure,
    granularity_figure,
    layer_figure,
    map_figure,
)
from coda_ray.tracking.report_tables import granularity_table
from coda_ray.tracking.table import compile_transfers, job_matrix, matrix_table
from invented import findings


def test_every_method_and_many_categories_are_told_apart_without_colour_too():
    assert set(STYLES) == set(NAMES)
    assert len({(style.colour, style.hatch) for style in STYLES.values()}) == len(STYLES)
    assert len({style.marker for style in STYLES.values()}) == len(STYLES)
    many = category_styles([f"moa {i}" for i in range(63)])
    assert len({(style.colour, style.marker) for style in many.values()}) == 63
    few = category_styles(["a", "b", "c"])
    assert len({style.marker for style in few.values()}) == 3


def test_bars_are_the_cells_of_the_matrix(results):
    tidy = matrix_table(compile_transfers(results), "accuracy", "source")
    figure = bar_figure(tidy)
    (panel,) = figure.axes
    assert figure.get_suptitle() == "accuracy (%), adapted per source, mean ± std over 2 seeds"
    heights = {bars.get_label(): [bar.get_height() for bar in bars] for bars in panel.containers if hasattr(bars, "patches")}
    assert heights["coda"][1:] == pytest.approx([50.5, 50.5])
    assert np.isnan(heights["coda"][0])
    assert heights["supervised"] == pytest.approx([20.5, 20.5, 20.5])
    assert [label.get_text() for label in panel.get_xticklabels()] == ["A\n(held-out plate)", "B", "C"]
    assert panel.get_ylabel() == "accuracy (%)"


def test_the_axis_reaches_over_the_bars_of_every_source(make_transfer):
    records = [make_transfer("A", "B", "coda", 0, accuracy=0.3), make_transfer("B", "A", "coda", 0, accuracy=0.95)]
    for panel in bar_figure(matrix_table(transfers_frame(records), "accuracy", "source")).axes:
        low, high = panel.get_ylim()
        assert low == 0
        assert high > 95


def test_published_figures_are_diamonds(make_transfer):
    tidy = matrix_table(transfers_frame([make_transfer("source_3", "source_5", "coda", 0)]), "accuracy", "source")
    (panel,) = bar_figure(tidy).axes
    drawn = [line.get_ydata() for line in panel.lines if line.get_marker() == "D" and len(line.get_ydata())]
    assert [list(values) for values in drawn] == [[pytest.approx(33.3)]]


def test_a_scale_bar_is_of_a_round_length_and_only_where_pixels_have_a_size(results):
    figure = example_figure(findings(results).examples)
    bars = {panel.texts[0].get_text(): panel.patches[0].get_width() for panel in figure.axes if panel.texts}
    assert bars == {"1 µm": pytest.approx(1 / 0.6)}
    assert sum(bool(panel.patches) for panel in figure.axes) == 4
    assert len(figure.axes) == 8
    assert figure.get_suptitle() == "Example tiles (red: DNA, green: ER)"


def test_a_scale_bar_of_a_whole_field():
    tile = np.zeros((1, 3, 448, 448), np.uint8)
    (first, _) = example_figure([Example("A", ("c",), ("DNA", "ER", "Mito"), tile, tile.astype(np.float32), 0.598)]).axes
    assert first.texts[0].get_text() == "50 µm"
    np.testing.assert_allclose(first.patches[0].get_width(), 50 / 0.598)


def test_units_and_targets_are_drawn_by_granularity(make_transfer):
    rows = [make_transfer("A", "B", method, 0) for method in ("dual-cb", "coda")]
    for unit in ("b1", "b2"):
        for scope, score in (("adapted", 0.7), ("whole", 0.6)):
            changes = {"granularity": "batch", "unit": unit, "scope": scope, "accuracy": score}
            rows.append(make_transfer("A", "B", "coda", 0, **changes, key=unit + scope))
    frame = transfers_frame(rows)
    (panel,) = granularity_figure(granularity_table(frame, job_matrix(frame, {"transfers": frame["key"].tolist()}))).axes
    lines = [list(line.get_ydata()) for line in panel.lines if line.get_marker() == STYLES["coda"].marker]
    assert [pytest.approx(line) for line in lines] == [[50, 60], [50, 70]]
    assert [list(line.get_ydata()) for line in panel.lines if line.get_linestyle() == ":"] == [[25.0, 25.0]]
    assert [label.get_text() for label in panel.get_xticklabels()] == ["source", "batch"]


def test_maps_show_every_tile_once_per_row(results):
    (found,) = findings(results).maps
    panels = map_figure(found).axes
    assert len(panels) == 4
    for panel in panels:
        assert sum(len(line.get_xdata()) for line in panel.lines) == 60
    assert panels[0].get_title() == "before adaptation (dual-cb)"
    assert panels[3].get_title() == "after adaptation (coda)"


def test_layers_and_differences_show_their_numbers(results):
    found = findings(results)
    first, second, _ = layer_figure(found.layers[0]).axes
    np.testing.assert_array_equal(first.images[0].get_array(), np.eye(3))
    assert first.images[0].get_clim() == second.images[0].get_clim() == (0, 1)
    (panel,) = difference_figure(pd.DataFrame(found.differences)).axes
    assert [label.get_text() for label in panel.get_yticklabels()] == ["B", "C", "all targets"]
    assert panel.get_title() == "coda − supervised"
