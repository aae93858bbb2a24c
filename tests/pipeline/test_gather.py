"""The report of a small finished matrix: what it shows, what it names as missing, and that it is written once."""

import io
import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from coda_ray.analysis.intervals import paired_difference
from coda_ray.config import Config, ConfigError, Place, dump_config
from coda_ray.pipeline import data, gather
from coda_ray.pipeline.evaluate import TILE_ID, predictions_of
from coda_ray.pipeline.gather import write_report
from coda_ray.pipeline.matrix import requests_of, run_transfers
from coda_ray.pipeline.request import Request
from coda_ray.pipeline.train_stages import pretrain
from coda_ray.pipeline.transfer import BOOTSTRAP_SEED, plan
from coda_ray.storage import open_place
from coda_ray.tiles.store import LABEL
from coda_ray.tracking.page import PAGE
from invented import Page
from synthetic import small_config, write_tiles

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
MATRIX = {
    "sources": ["a"],
    "targets": ["b", "c"],
    "methods": ["dual-mae", "ttt", "oda", "coda"],
    "granularities": ["source", "batch"],
    "splits": ["plate", "compounds"],
    "seeds": [0],
}


def changed(config, **sections):
    """The same configuration but for some fields of some sections."""
    update = {name: getattr(config, name).model_copy(update=fields) for name, fields in sections.items()}
    return config.model_copy(update=update)


def smaller(config):
    """The same matrix without its batches and its held-out compounds: few figures to draw."""
    return changed(config, matrix={"granularities": ["source"], "splits": ["plate"]})


@pytest.fixture(scope="module")
def config(ray_cluster, tmp_path_factory):
    """A finished matrix of one source and two targets, one with a model of its own; the report is not written yet."""
    config = small_config(
        tmp_path_factory.mktemp("gather"), matrix=MATRIX, report={"layer_tiles": 20, "map_tiles": 30}, evaluate={"profiles": True}
    )
    for source in "abc":
        write_tiles(config, source, batches=2, plates_per_batch=2)
    run_transfers(config, requests_of(config), kind="matrix", name="a → b, c", command="make it", say=lambda line: None)
    pretrain(config, "b", objective="dino-cb", seed=0).run(config, None)
    return config


@pytest.fixture(scope="module")
def report(config):
    """What was told, the folder and the page."""
    said, results = [], open_place(config.results)
    written = write_report(config, None, said.append)
    job = next(name for name in results.names("jobs") if name.endswith(".json")).removesuffix(".json")
    folder = results.child(f"report/{job}")
    return written, folder, Page(folder.read(PAGE).decode()), said


def csv(folder, name):
    return pd.read_csv(io.BytesIO(folder.read(f"{name}.csv")))


def test_every_table_and_figure_is_there(report):
    written, folder, page, said = report
    assert written.fresh
    assert not written.unfinished
    assert not written.failed
    assert any("layers of" in line for line in said)
    for split in ("", "-compounds"):
        for granularity in ("source", "batch"):
            names = [f"table-2-{per}accuracy-{granularity}{split}" for per in ("", "well-", "compound-")]
            names += [f"table-4-{per}macro-f1-{granularity}{split}" for per in ("", "well-", "compound-")]
            names += [f"table-{number}-accuracy-{granularity}{split}" for number in (3, 5)]
            assert set(names) | {f"differences-table-{granularity}{split}"} <= set(page.tables)
            assert {f"figure-7-bars-{granularity}{split}", f"differences-{granularity}{split}"} <= set(page.names)
        assert f"figure-4-granularity{split}" in page.names
    assert {"data", "feature-scores"} <= set(page.tables)
    figures = {"figure-3-examples", "figure-5-map-a-b", "figure-6-layers-adaptation-a-b", "figure-6-layers-own-a-b"}
    assert figures <= set(page.names)
    assert set(folder.names()) >= {f"{name}.{kind}" for name in figures for kind in ("png", "svg")}
    assert "unfinished" not in page.names
    assert "make it" in page.text


def test_its_numbers_are_those_of_the_transfers(config, report):
    _, folder, page, _ = report
    frame = pd.read_parquet(io.BytesIO(open_place(config.results).read("transfers.parquet")))
    header, *rows = page.tables["table-2-accuracy-source"]
    cells = {(row[0], method): cell for row in rows for method, cell in zip(header[1:], row[1:], strict=True)}
    whole = frame[(frame["scope"] == "whole") & (frame["split"] == "plate") & (frame["granularity"] == "source")]
    for (source, target, method), part in whole.groupby(["source", "target", "method"]):
        assert cells[f"{source} → {target}", method] == f"{100 * part['accuracy'].item():.1f} ± –"
    features = csv(folder, "feature-scores").set_index(["split", "source", "target", "granularity", "method"])
    one = whole[(whole["source"] == "a") & (whole["target"] == "b") & (whole["method"] == "coda")]
    assert features.loc[("plate", "a", "b", "source", "coda"), "replicate_map"] == pytest.approx(one["replicate_map"].item())
    facts = csv(folder, "data").set_index("source")
    assert facts.loc["a", ["batches", "plates", "wells", "moas", "images", "labelled"]].tolist() == [2, 4, 28, 3, 56, 48]


def right(config, source, target, method):
    """Whether each image was classified rightly, and its well, looked up one by one."""
    transfer = plan(config, Request(source, target, method, "source", 0))[-1]
    told = {tuple(row[:5]): row[5] for row in predictions_of(config, transfer.evaluation)[[*TILE_ID, "predicted"]].to_numpy()}
    frame = transfer.index.frame
    tiles = [tuple(row) for row in frame[TILE_ID].to_numpy()]
    return np.array([told[tile] == label for tile, label in zip(tiles, frame[LABEL], strict=True)]), np.array(
        ["/".join(tile[:4]) for tile in tiles]
    )


@pytest.mark.parametrize(("method", "against"), [("coda", "dual-cb"), ("coda", "oda"), ("ttt", "dual-mae")])
def test_differences_are_paired_over_wells(config, report, method, against):
    table = csv(report[1], "differences-table-source")
    rows = table[(table["method"] == method) & (table["against"] == against)].set_index("target")
    assert list(rows.index) == ["b", "c", "all targets"]
    pairs = {"b": [("a", "b")], "c": [("a", "c")]}
    for target, chosen in {**pairs, "all targets": pairs["b"] + pairs["c"]}.items():
        sides = [np.concatenate([right(config, source, end, name)[0] for source, end in chosen]) for name in (method, against)]
        wells = np.concatenate([right(config, source, end, method)[1] for source, end in chosen])
        expected = paired_difference(wells, *sides, seed=BOOTSTRAP_SEED)
        assert rows.loc[target, ["difference", "low", "high"]].tolist() == pytest.approx(expected)
        assert rows.loc[target, "n_wells"] == len(set(wells))
        assert rows.loc[target, "n_seeds"] == 1


def test_a_well_is_drawn_for_all_sources_at_once():
    names = pd.MultiIndex.from_tuples([("t", "b", "p", f"A{i // 2}", str(i)) for i in range(8)], names=TILE_ID)
    rng = np.random.default_rng(0)
    columns = pd.MultiIndex.from_product([["coda", "oda"], [0, 1]])
    parts = [pd.DataFrame(rng.random((8, 4)) < 0.5, names, columns) for _ in range(2)]
    found = gather.compared(parts, "coda", "oda", [0, 1])
    wells = np.tile([f"well {i // 2}" for i in range(8)], 2)
    sides = [np.concatenate([part[name].to_numpy() for part in parts]).T for name in ("coda", "oda")]
    assert found[:3] == paired_difference(wells, *sides, seed=BOOTSTRAP_SEED)
    assert found[3:] == (8, 4, 2)


def test_differences_of_units_are_weighted_as_in_the_matrix(config, report):
    differences, matrix = csv(report[1], "differences-table-batch"), csv(report[1], "table-2-accuracy-batch")
    row = differences[(differences["target"] == "b") & (differences["method"] == "coda") & (differences["against"] == "dual-cb")]
    means = matrix[(matrix["source"] == "a") & (matrix["target"] == "b")].set_index("method")["mean"]
    assert row["difference"].item() == pytest.approx(means["coda"] - means["dual-cb"])


def test_a_second_report_is_a_look_up(config, report, monkeypatch):
    first = report[0]

    def never(*arguments, **options):
        raise AssertionError

    for name in ("run_stages", "start_ray", "report_files", "_examples"):
        monkeypatch.setattr(gather, name, never)
    said = []
    again = write_report(config, None, said.append)
    assert not again.fresh
    assert (again.address, again.files) == (first.address, first.files)
    assert said == []


def test_the_report_goes_where_it_is_asked_to(config, report, monkeypatch, capsys, tmp_path):
    (tmp_path / "config.yaml").write_text(dump_config(config))
    monkeypatch.setattr(
        sys, "argv", ["jobs/report.py", "--config", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "elsewhere")]
    )
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "jobs" / "report.py"), run_name="__main__")
    assert ended.value.code == 0
    assert f"files: {tmp_path}/elsewhere/{PAGE}" in capsys.readouterr().out
    assert (tmp_path / "elsewhere" / PAGE).read_bytes() == report[1].read(PAGE)


def test_stages_that_are_not_finished_are_named_and_not_run(config, report, tmp_path):
    shutil.copytree(config.results.address, tmp_path / "results")
    elsewhere = Config.model_validate({**config.model_dump(mode="json"), "results": {"address": str(tmp_path / "results")}})
    elsewhere = changed(elsewhere, report={"pairs": [("a", "b"), ("a", "c")]})
    results = open_place(elsewhere.results)
    damaged = plan(elsewhere, Request("a", "c", "coda", "source", 0))[-1].trained
    results.write(f"{damaged.path}/{damaged.facts(results)['file']}", b"damaged")
    transfer = plan(elsewhere, Request("a", "b", "coda", "source", 0))[-1]
    lost = [transfer.trained, transfer.evaluation, transfer.profile]
    for stage in lost:
        results.delete(stage.path)
    results.delete(f"transfers/{transfer.key}.json")
    written = write_report(elsewhere, None, lambda line: None)
    page = Page(open_place(elsewhere.results).read(f"report/{results.names('report')[0]}/{PAGE}").decode())
    assert written.fresh
    assert written.failed == 1
    text = " ".join(page.text)
    assert "DamagedFileError" in text
    assert {"figure-5-map-a-c", "unfinished"} <= set(page.names)
    assert all(stage.title in page.text for stage in lost)
    assert "make it" in text
    assert f"Map (figure 5) of a → b: not finished: {transfer.evaluation.title}." in text
    assert "figure-5-map-a-b" not in page.names
    assert all(stage.facts(results) is None for stage in lost)
    header, *rows = page.tables["table-2-accuracy-source"]
    (row,) = [row for row in rows if row[0] == "a → b"]
    assert row[header.index("coda")] == "–"
    assert row[header.index("oda")] != "–"


def test_a_matrix_that_was_never_run_has_a_report_too(config, tmp_path):
    elsewhere = Config.model_validate({**config.model_dump(mode="json"), "results": {"address": str(tmp_path / "results")}})
    written = write_report(elsewhere, None, lambda line: None)
    page = Page(Path(written.address).read_text())
    assert set(page.tables) == {"data"}
    assert gather.REMEDY in page.text
    assert not (tmp_path / "results" / "jobs").exists()


def linked(folder):
    """Names that the page of a report links."""
    return {name for name in Page(folder.read(PAGE).decode()).addresses if not name.startswith(("data:", "#"))}


def test_files_of_an_older_report_do_not_stay(config, report, tmp_path):
    out, config = open_place(Place(address=str(tmp_path))), smaller(config)
    write_report(changed(config, report={"method": "oda", "pairs": [("a", "b")]}), out, lambda line: None)
    assert set(out.names()) == {PAGE, "report.json"} | linked(out)
    out.write("report.json", json.dumps({"key": "older", "files": ["figure-9.png"]}).encode())
    out.write("figure-9.png", b"stale")
    out.write("mine.txt", b"kept")
    assert write_report(config, out, lambda line: None).fresh
    assert set(out.names()) == {PAGE, "report.json", "mine.txt"} | linked(out)


def test_the_target_s_own_model_is_asked_for_where_it_is_missing(config, report):
    only = changed(smaller(config), report={"pairs": [("a", "c")]})
    written = write_report(only, open_place(config.results).child("to-c"), lambda line: None)
    text = " ".join(Page(Path(written.address).read_text()).text)
    assert "no model that was pre-trained on c; add it to matrix.sources" in text


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"method": "oda-mae"}, "report.method = 'oda-mae': not in matrix.methods; choose from oda, coda"),
        ({"pairs": [("a", "a")]}, "not in the matrix; give a source and a target of it that differ"),
        ({"pairs": [("b", "c")]}, "not in the matrix; give a source and a target of it that differ"),
    ],
)
def test_what_the_matrix_does_not_have_cannot_be_shown(config, fields, told):
    with pytest.raises(ConfigError, match=told):
        write_report(changed(config, report=fields), None, lambda line: None)


def test_examples_are_of_compounds_in_common_and_as_stored(config):
    examples = gather._examples(config)
    assert [example.source for example in examples] == ["a", "b", "c"]
    assert len({example.compounds for example in examples}) == 1
    one = examples[0]
    assert one.raw.shape == (4, 2, 32, 32)
    assert one.channels == ("DNA", "ER")
    np.testing.assert_allclose(one.normalised.mean((2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(one.normalised.std((2, 3)), 1, atol=1e-2)
    frame = data.load_tiles(config, "a").frame
    first = frame[frame["Metadata_JCP2022"] == one.compounds[1]].iloc[0]
    shard = np.load(Path(config.tiles.address) / data.load_tiles(config, "a").folder.root / first["shard"])
    np.testing.assert_array_equal(one.raw[1], shard[first["row"]])
