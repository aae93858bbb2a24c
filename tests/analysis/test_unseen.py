"""The tables of the study of unseen worlds, on answers that are counted by hand."""

import numpy as np
import pandas as pd
import pytest

from benchmarks.unseen import COLUMNS, PARTS, table
from coda_ray.config import Config, build_config
from coda_ray.pipeline.evaluate import TILE_ID
from coda_ray.pipeline.matrix import requests_of


def answers(right):
    """Whether each of four images of two wells was named rightly, by method, in one world."""
    tiles = [("21/sim_b", "b", "p", well, str(site)) for well in ("A01", "A02") for site in (0, 1)]
    index = pd.MultiIndex.from_tuples(tiles, names=TILE_ID)
    return pd.DataFrame({(method, 0): values for method, values in right.items()}, index=index)


def rows(accuracy):
    """One transfer and one score at home."""
    told = [("sim_b", method, value) for method, value in accuracy.items()] + [("sim_a", "supervised", 1.0)]
    fixed = {"part": "plate", "variant": "as it is", "split": "plate", "world": 21, "source": "sim_a", "seed": 0, "n_images": 4}
    scores = [{"target": t, "method": m, "accuracy": v, "well_accuracy": v, "compound_accuracy": v} for t, m, v in told]
    return pd.DataFrame([{**fixed, **score} for score in scores])[COLUMNS]


def test_the_table_ranks_and_tells_what_a_method_changes():
    right = {"supervised": [1, 0, 1, 0], "dual-cb": [1, 0, 0, 0], "coda": [1, 1, 1, 0]}
    told = table(rows({m: float(np.mean(v)) for m, v in right.items()}), [answers({m: np.bool_(v) for m, v in right.items()})])
    first, *lines = told.splitlines()
    assert first == "in-domain supervised 100.0; 1 transfers, 1 world(s), 1 seed(s)"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[3:]]
    assert [line[0] for line in cells] == ["coda", "supervised", "dual-cb"]
    # 75 of 50 to 100 is half of the gap; two of four images more than dual-cb, one in each well.
    assert cells[0][1:] == ["75.0", "75.0", "75.0", "50 %", "1", "dual-cb", "+50.0", "+50.0 (+50.0 to +50.0)"]
    assert cells[1][4:] == ["0 %", "1", "", "", ""]
    assert cells[2][4] == "-50 %"


@pytest.mark.parametrize(("part", "variant"), [(part, variant) for part, found in PARTS.items() for variant in found.variants])
def test_every_part_is_a_configuration(tmp_path, part, variant):
    options = [word for name in ("tiles", "results") for word in (f"--{name}.address", str(tmp_path / name))]
    config = build_config(Config, "configs/unseen.yaml", [*options, *PARTS[part].variants[variant].options])
    asked = {request.method for request in requests_of(config)}
    assert {"supervised", "dual-cb"} <= asked
