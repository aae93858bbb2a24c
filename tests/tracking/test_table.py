import io
import json

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from coda_ray.tracking.records import SCORES, TRANSFER_COLUMNS, transfers_frame
from coda_ray.tracking.table import (
    cell_text,
    compile_transfers,
    job_matrix,
    markdown_matrix,
    matrices,
    matrix_table,
    mean_scores,
    ranking,
    ranking_rows,
    render_matrix,
    shown,
)


def row(table, source, target, method):
    (found,) = table[(table["source"] == source) & (table["target"] == target) & (table["method"] == method)].to_dict("records")
    return found


def per_unit(make_transfer, method, seed, granularity, units):
    """Rows of a target's units: name → (images, wells, accuracy adapted, accuracy of the whole target)."""
    rows = []
    for unit, (images, wells, adapted, whole) in units.items():
        for scope, score, n, w in (("adapted", adapted, images, wells), ("whole", whole, 1000, 100)):
            rows.append(
                make_transfer(
                    "A", "B", method, seed, granularity=granularity, unit=unit, scope=scope, accuracy=score,
                    well_accuracy=score, n_images=n, n_wells=w, key=f"{method}{seed}{granularity}{unit}{scope}",
                )
            )  # fmt: skip
    return rows


def test_compile_reads_every_record_and_writes_the_table(results):
    table = compile_transfers(results)
    assert tuple(table.columns) == TRANSFER_COLUMNS
    assert len(table) == len([n for n in results.names("transfers") if n.endswith(".json")]) == 10
    identity = table[["source", "target", "method", "granularity", "unit", "scope", "split", "seed"]]
    assert [tuple(r) for r in identity.itertuples(index=False)] == sorted(tuple(r) for r in identity.itertuples(index=False))
    on_disk = pd.read_parquet(io.BytesIO(results.read("transfers.parquet")))
    pd.testing.assert_frame_equal(on_disk, table)
    one = json.loads(results.read(f"transfers/{table['key'].iloc[3]}.json"))
    assert {name: one[name] for name in TRANSFER_COLUMNS} == table.iloc[3].to_dict()


def test_an_empty_folder_gives_an_empty_table_with_all_columns(tmp_path, results):
    empty = results.child("nothing")
    assert tuple(compile_transfers(empty).columns) == TRANSFER_COLUMNS
    assert empty.exists("transfers.parquet")
    assert matrix_table(compile_transfers(empty), "accuracy", "batch").empty


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"{", "not JSON"), (b"[]", "not a record"), (b'{"key": "bad"}', "lacks source")],
)
def test_a_damaged_record_is_named(results, data, message):
    results.write("transfers/bad.json", data)
    with pytest.raises(ValueError, match=message) as error:
        compile_transfers(results)
    assert "bad.json" in str(error.value)
    assert "run its job again" in str(error.value)


def test_matrix_by_source_against_numbers_worked_out_by_hand(results):
    table = matrix_table(compile_transfers(results), "accuracy", "source")
    assert list(table["metric"].unique()) == ["accuracy"]
    assert list(table["granularity"].unique()) == ["source"]
    coda = row(table, "A", "B", "coda")
    assert coda["mean"] == pytest.approx(0.505)
    assert coda["std"] == pytest.approx(0.01 / np.sqrt(2))  # sample std of 0.50 and 0.51
    assert coda["n_seeds"] == 2
    assert row(table, "A", "A", "supervised")["mean"] == pytest.approx(0.205)
    assert [*zip(table["source"], table["target"], table["method"], strict=True)] == [
        ("A", "A", "supervised"),
        ("A", "B", "supervised"),
        ("A", "B", "coda"),
        ("A", "C", "supervised"),
        ("A", "C", "coda"),
    ]


def test_units_are_weighted_by_images_and_wells_and_taken_after_adaptation(make_transfer):
    units = {"b1": (100, 30, 0.6, 0.1), "b2": (300, 10, 0.2, 0.1)}
    rows = per_unit(make_transfer, "coda", 0, "batch", units)
    rows += per_unit(make_transfer, "coda", 1, "batch", {"b1": (100, 30, 0.8, 0.9), "b2": (300, 10, 0.4, 0.9)})
    rows += [make_transfer("A", "B", "coda", 0)]  # granularity source: no part of this table
    # The unadapted model is scored per unit too, but its cell is its whole-target row.
    rows += [*per_unit(make_transfer, "dual-cb", 0, "batch", units), make_transfer("A", "B", "dual-cb", 0)]
    rows += [make_transfer("A", "A", "dual-cb", 0)]
    table = matrix_table(transfers_frame(rows), "accuracy", "batch")
    coda = row(table, "A", "B", "coda")
    per_seed = [(100 * 0.6 + 300 * 0.2) / 400, (100 * 0.8 + 300 * 0.4) / 400]  # 0.3, 0.5
    assert coda["mean"] == pytest.approx(0.4)
    assert coda["std"] == pytest.approx(np.std(per_seed, ddof=1))
    assert row(table, "A", "B", "dual-cb")["mean"] == pytest.approx(0.25)
    assert np.isnan(row(table, "A", "B", "dual-cb")["std"])
    assert row(table, "A", "A", "dual-cb")["mean"] == pytest.approx(0.25)
    wells = row(matrix_table(transfers_frame(rows), "well_accuracy", "batch"), "A", "B", "coda")
    assert wells["mean"] == pytest.approx(np.mean([(30 * 0.6 + 10 * 0.2) / 40, (30 * 0.8 + 10 * 0.4) / 40]))


def test_a_seed_that_lacks_a_unit_does_not_count(make_transfer):
    units = {"b1": (1, 1, 0.6, 0), "b2": (1, 1, 0.2, 0)}
    rows = per_unit(make_transfer, "coda", 0, "batch", units)
    rows += per_unit(make_transfer, "coda", 1, "batch", {"b1": (1, 1, 0.9, 0)})
    # The unadapted model is scored on every unit, whatever becomes of the adaptations.
    rows += per_unit(make_transfer, "dual-cb", 0, "batch", units) + per_unit(make_transfer, "dual-cb", 1, "batch", units)
    found = row(matrix_table(transfers_frame(rows), "accuracy", "batch"), "A", "B", "coda")
    assert found["n_seeds"] == 1
    assert found["mean"] == pytest.approx(0.4)


def test_every_seed_may_have_drawn_a_unit_of_its_own(make_transfer):
    rows = []
    for seed, (unit, score) in enumerate([("b1", 0.6), ("b2", 0.2), ("b1", 0.4)]):
        for method in ("dual-cb", "coda"):
            rows += per_unit(make_transfer, method, seed, "batch", {unit: (1, 1, score, 0)})
    matrix = job_matrix(transfers_frame(rows), {"transfers": [r["key"] for r in rows]})
    (of_batch,) = matrices(matrix, "accuracy")
    found = row(of_batch, "A", "B", "coda")
    assert found["n_seeds"] == 3
    assert found["mean"] == pytest.approx(0.4)
    assert found["std"] == pytest.approx(0.2)


def test_results_of_two_configurations_are_not_mixed(make_transfer):
    rows = [make_transfer("A", "B", "coda", 0), make_transfer("A", "B", "coda", 0, key="other")]
    frame = transfers_frame(rows)
    with pytest.raises(ValueError, match=r"A → B, coda, B, seed 0.*pass those of one job"):
        matrix_table(frame, "accuracy", "source")
    (of_one,) = matrices(job_matrix(frame, {"transfers": ["other"]}), "accuracy")
    assert row(of_one, "A", "B", "coda")["n_seeds"] == 1
    with pytest.raises(ValueError, match=r"metric = 'f1'"):
        matrix_table(frame, "f1", "source")


def test_a_jobs_matrix_has_every_granularity_that_was_adapted(make_transfer):
    rows = [make_transfer("A", "B", "dual-cb", 0), make_transfer("A", "B", "coda", 0)]
    rows += per_unit(make_transfer, "coda", 0, "plate", {"p1": (1, 1, 0.6, 0)})
    matrix = job_matrix(transfers_frame(rows), {"transfers": [r["key"] for r in rows]})
    assert list(matrix["granularity"].unique()) == ["source", "plate"]
    assert matrix["metric"].nunique() == len(SCORES)
    assert len(matrix) == len(SCORES) * 2 * 2


def test_held_out_compounds_have_a_matrix_of_their_own(make_transfer):
    rows = [make_transfer("A", "B", "coda", 0), make_transfer("A", "B", "coda", 0, split="compounds", accuracy=0.1, key="x")]
    plate, compounds = matrices(job_matrix(transfers_frame(rows), {"transfers": [r["key"] for r in rows]}), "accuracy")
    assert row(plate, "A", "B", "coda")["mean"] == pytest.approx(0.5)
    assert row(compounds, "A", "B", "coda")["mean"] == pytest.approx(0.1)
    assert "accuracy (%), compounds held out, adapted per source" in markdown_matrix(compounds)


def test_the_tables_say_what_they_show(results):
    tidy = matrix_table(compile_transfers(results), "macro_f1", "source")
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(render_matrix(tidy))
    text = console.export_text()
    assert "macro-F1 (%), adapted per source, mean ± std over 2 seeds" in text
    assert "25.2 ± 0.4" in text
    assert "A → B" in text
    markdown = markdown_matrix(tidy)
    assert "| A → A | 10.2 ± 0.4 | – |" in markdown
    assert "| mean of 2 source ≠ target | 10.2 ± 0.4 | 25.2 ± 0.4 |" in markdown


def test_the_mean_over_pairs_varies_as_that_of_each_seed_does(make_transfer):
    """Not as its cells: what goes up in one and down in the other leaves the mean where it is."""
    scores = {"B": [0.30, 0.40, 0.50], "C": [0.70, 0.60, 0.53]}
    rows = [
        make_transfer("A", target, "coda", seed, accuracy=score)
        for target, of_seeds in scores.items()
        for seed, score in enumerate(of_seeds)
    ]
    rows += [make_transfer("A", target, "dual-cb", seed, accuracy=0.1 * seed) for target in "BC" for seed in (0, 1)]
    rows += [make_transfer("A", "B", "dual-cb", 2, accuracy=0.2), make_transfer("A", "D", "dual-cb", 0)]
    tidy = matrix_table(transfers_frame(rows), "accuracy", "source")
    assert row(tidy, "A", "B", "coda") | {"seed_0": 0.30, "seed_1": 0.40, "seed_2": 0.50} == row(tidy, "A", "B", "coda")
    assert np.isnan(row(tidy, "A", "C", "dual-cb")["seed_2"])
    coda = cell_text(np.mean([0.5, 0.5, 0.515]), np.std([0.5, 0.5, 0.515], ddof=1))
    # The third seed of dual-cb lacks a pair: it counts in the cell, but says nothing of the spread.
    dual = cell_text(np.mean([0.1, 0.05]), np.std([0.0, 0.1], ddof=1))
    assert f"| mean of 2 source ≠ target | {dual} | {coda} |" in markdown_matrix(tidy)
    assert mean_scores(tidy)["mean_accuracy/coda"] == pytest.approx(0.505)


def test_cells_and_order():
    assert cell_text(0.245, 0.006) == "24.5 ± 0.6"
    assert cell_text(0.245, float("nan")) == "24.5 ± –"
    assert cell_text(float("nan"), float("nan")) == "–"
    assert shown(["source_10", "source_3", "source_3"]) == ["source_3", "source_10"]
    assert shown(["coda", "oda", "dual-cb", "supervised"]) == ["supervised", "dual-cb", "oda", "coda"]


def test_methods_are_ranked_per_image_well_and_compound_with_the_gap_that_they_close(make_transfer):
    def scores(method, image, well, compound):
        return [
            make_transfer("A", target, method, 0, accuracy=image + shift, well_accuracy=well, compound_accuracy=compound)
            for target, shift in (("B", 0.1), ("C", -0.1))
        ]

    records = [make_transfer("A", "A", "supervised", 0, accuracy=0.8)]
    records += scores("supervised", 0.2, 0.3, 0.4) + scores("coda", 0.5, 0.6, 0.9) + scores("dual-cb", 0.45, 0.7, 0.95)
    frame = transfers_frame(records)
    (table,) = ranking(job_matrix(frame, {"transfers": frame["key"].tolist()}))
    assert table["method"].tolist() == ["coda", "dual-cb", "supervised"]
    assert table["pairs"].tolist() == [2, 2, 2]
    assert table["accuracy"].tolist() == pytest.approx([0.5, 0.45, 0.2])
    assert table["well_accuracy"].tolist() == pytest.approx([0.6, 0.7, 0.3])
    assert table["compound_accuracy"].tolist() == pytest.approx([0.9, 0.95, 0.4])
    assert table["gap_closed"].tolist() == pytest.approx([0.3 / 0.6, 0.25 / 0.6, 0.0])
    assert table["uses"].tolist() == ["compounds", "", ""]
    header, rows = ranking_rows(table)
    assert dict(zip(header, rows[0], strict=True)) == {
        "method": "coda", "per image": "50.0 ± –", "per well": "60.0 ± –", "per compound": "90.0 ± –", "gap closed": "50 %",
        "learns from": "pairs of one compound",
    }  # fmt: skip


def test_without_a_supervised_model_or_another_source_there_is_no_gap(make_transfer):
    one = transfers_frame([make_transfer("A", "B", "coda", 0)])
    (table,) = ranking(job_matrix(one, {"transfers": one["key"].tolist()}))
    assert np.isnan(table["gap_closed"].iloc[0])
    assert ranking_rows(table)[1][0][4] == "–"
    alone = transfers_frame([make_transfer("A", "A", "supervised", 0)])
    assert ranking(job_matrix(alone, {"transfers": alone["key"].tolist()})) == []
