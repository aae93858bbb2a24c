import math

import pandas as pd
import pytest

from coda_ray.tracking.records import transfers_frame
from coda_ray.tracking.report_tables import autoencoder_tables, feature_tables, granularity_table, score_tables
from coda_ray.tracking.table import job_matrix


def tables(rows):
    frame = transfers_frame(rows)
    return frame, job_matrix(frame, {"transfers": frame["key"].tolist()})


def test_the_papers_figure_stands_below_ours(make_transfer):
    rows = [make_transfer("source_3", target, "coda", 0) for target in ("source_5", "source_9")]
    _, tidy = tables(rows)
    table = score_tables(tidy, "accuracy", "2")[0]
    assert table.rows[0] == ["source_3 → source_5", "50.0 ± –\npaper 33.3 ± 0.3"]
    assert table.rows[1] == ["source_3 → source_9", "50.0 ± –"]
    assert table.data["published_mean"].tolist() == pytest.approx([0.333, math.nan], nan_ok=True)
    assert "published_mean" not in score_tables(tidy, "macro_f1", "4")[0].data


def test_scores_per_image_come_first_and_the_others_are_folded(make_transfer):
    _, tidy = tables([make_transfer("A", "B", "coda", 0), make_transfer("A", "B", "coda", 0, split="compounds", key="x")])
    found = score_tables(tidy, "accuracy", "2")
    assert [table.name for table in found] == [
        "table-2-accuracy-source", "table-2-accuracy-source-compounds", "table-2-well-accuracy-source",
        "table-2-well-accuracy-source-compounds", "table-2-compound-accuracy-source",
        "table-2-compound-accuracy-source-compounds",
    ]  # fmt: skip
    assert [table.folded for table in found] == [False, False, True, True, True, True]


def test_autoencoders_are_compared_where_two_methods_are_there(make_transfer):
    record = make_transfer("A", "B", "coda", 0)
    rows = [record | {"method": method, "key": method, "accuracy": score} for method, score in (("dual-mae", 0.1), ("ttt", 0.2))]
    _, tidy = tables([*rows, record])
    (table,) = autoencoder_tables(tidy)
    assert table.title.startswith("Table 5, ")
    assert table.header == ["source → target", "dual-mae", "ttt"]
    assert table.rows == [["A → B", "10.0 ± –", "20.0 ± –"]]


def test_granularity_on_the_unit_and_on_the_whole(make_transfer):
    rows = [make_transfer("A", "B", "coda", 0)]
    for unit, n, inside, outside in (("b1", 1, 0.2, 0.4), ("b2", 3, 0.6, 0.5)):
        changes = {"granularity": "batch", "unit": unit, "n_images": n}
        rows.append(make_transfer("A", "B", "coda", 0, **changes, scope="adapted", accuracy=inside, key=f"{unit}a"))
        rows.append(make_transfer("A", "B", "coda", 0, **changes, scope="whole", accuracy=outside, key=f"{unit}w"))
    table = granularity_table(*tables(rows)).set_index(["granularity", "scope"])["mean"]
    assert table["batch", "adapted"] == pytest.approx((0.2 + 3 * 0.6) / 4)
    assert table["batch", "whole"] == pytest.approx(0.45)
    assert table["source", "adapted"] == table["source", "whole"] == 0.5


def test_scores_of_features_stand_in_the_order_of_methods_with_their_spread(make_transfer):
    rows = [make_transfer("A", "B", method, seed, moa_map=seed / 10) for method in ("coda", "dual-cb") for seed in (0, 1)]
    rows.append(make_transfer("A", "A", "dual-cb", 0))
    (table,) = feature_tables(transfers_frame(rows))
    assert [row[:2] for row in table.rows] == [["A → B", "dual-cb"], ["A → B", "coda"]]
    assert table.rows[0][table.header.index("same MoA (mAP)")] == "0.050 ± 0.071"
    assert table.data["n_seeds"].tolist() == [2, 2]
    assert feature_tables(transfers_frame(rows[-1:])) == []


def test_nothing_is_said_of_what_is_not_there(make_transfer):
    frame, tidy = tables([make_transfer("A", "B", "coda", 0)])
    assert autoencoder_tables(tidy) == []
    assert isinstance(granularity_table(frame, tidy), pd.DataFrame)
