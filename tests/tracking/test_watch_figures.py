"""The picture of drift: every plate is in it, and it is drawn whatever is missing."""

import numpy as np
import pandas as pd
import pytest

from coda_ray.tracking.figures import figure_png
from coda_ray.tracking.watch_figures import MOST_NAMED, drift_figure


def plates(count):
    return pd.DataFrame(
        {
            "plate": [f"p{i}" for i in range(count)],
            "state": ["reported"] * (count - 1) + ["aside"],
            "drift_source": np.linspace(0.2, 2, count),
            "drift_nearest": np.linspace(0.2, 0.5, count),
            "threshold": 1.0,
            "granularity": ["source"] + ["plate"] * (count - 1),
        }
    )


def test_every_plate_is_drawn_at_its_distances():
    figure = drift_figure(plates(5))
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    np.testing.assert_allclose(lines["from the source"].get_ydata(), np.linspace(0.2, 2, 5))
    nearest = np.concatenate([line.get_ydata() for name, line in lines.items() if "nearest" in name or "same" in name])
    np.testing.assert_allclose(sorted(nearest), np.linspace(0.2, 0.5, 5))
    assert lines["set aside"].get_xdata().tolist() == [5]
    assert [label.get_text() for label in axes.get_xticklabels()] == [f"p{i}" for i in range(5)]
    assert figure_png(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize("count", [1, 2, MOST_NAMED + 10])
def test_it_is_drawn_for_few_and_many_plates_and_without_measures(count):
    table = plates(count)
    table.loc[:, ["drift_source", "drift_nearest", "threshold"]] = float("nan")
    table["granularity"] = pd.Series(None, index=table.index, dtype="str")
    assert figure_png(drift_figure(table)).startswith(b"\x89PNG")
