"""The whole way as jobs: simulated bucket on S3 -> tiles -> model -> real microscope fields; and the paper's settings."""

import io
import json
import re
import runpy
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from coda_ray.methods import NAMES
from real_images import REAL_IMAGES, real_list

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture
def job(ray_cluster, monkeypatch, capsys):
    """Run a job in this process, on the Ray that is there; give what it printed."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"jobs/{name}", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "jobs" / name), run_name="__main__")
        printed = capsys.readouterr()
        assert not ended.value.code, printed.out + printed.err
        return printed.out

    return run


def small(tmp_path, bucket, **sections):
    """A configuration over the tiny bucket behind its S3 server, with tiles and results in a folder."""
    config = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    config |= {
        "bucket": bucket.place.model_dump(),
        "metadata": bucket.metadata.model_dump(),
        "tiles": {"address": str(tmp_path / "tiles")},
        "results": {"address": str(tmp_path / "results")},
        "tracking": {"enabled": False},
        **sections,
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def test_a_model_from_simulation_adapts_to_real_fields(job, tiny_bucket, tmp_path):
    images = real_list(tmp_path / "list.csv")
    file = small(
        tmp_path,
        tiny_bucket,
        ingest={"sources": ["sim_a"], "channels": ["DNA", "RNA", "AGP"], "pixel_size_um": None},
        views={"tile_crop": 40, "size_global": 32, "size_local": 16, "locals_per_sample": 2},
        pretrain={"steps": 4, "minibatch": 8},
        classify={"steps": 4, "minibatch": 8},
        adapt={"steps": 4, "minibatch": 2, "no_partner": "same-image"},
    )
    job("ingest.py", "--config", file)
    real = ["--ingest.image-list", images, "--bucket.address", REAL_IMAGES, "--ingest.sources", "[]"]
    shown = job("ingest.py", "--config", file, *real, "--bucket.anonymous", "false", "--bucket.endpoint-url", "null")
    assert "3 plates, 3 sites" in shown
    arguments = ["--source", "sim_a", "--target", "source_1", "--method", "coda", "--granularity", "source"]
    shown = job("adapt.py", "--config", file, *arguments)
    (adapted,) = [json.loads(p.read_text()) for p in (tmp_path / "results" / "adapt").glob("*/done.json")]
    assert adapted["steps"] == 4
    assert "no MoA labels, so no score: evaluate adapt coda sim_a to source_1" in shown
    tables = [pd.read_parquet(p) for p in (tmp_path / "results" / "evaluate").glob("*/embeddings.parquet")]
    assert sorted(map(len, tables)) == [2, 2]
    before, after = (t.filter(like="feature_").to_numpy() for t in tables)
    assert abs(before - after).max() > 0
    assert set(tables[0]["Metadata_Batch"]) == {"Batch1_20221004", "Batch4_20221012"}


def test_the_papers_settings_run_at_full_size(job, tiny_bucket, tmp_path):
    """Two steps of each stage with configs/paper.yaml: DeiT-S, 224 px views; only the amounts are small."""
    config = yaml.safe_load((ROOT / "configs" / "paper.yaml").read_text())
    bucket = {"bucket": tiny_bucket.place.model_dump(), "metadata": tiny_bucket.metadata.model_dump()}
    config |= bucket | {name: {"address": str(tmp_path / name)} for name in ("tiles", "results")}
    config["ingest"] |= {"sources": ["sim_a", "sim_b"], "pixel_size_um": 0.12}
    config["model"]["init"] = "random"
    config |= {"held_out": {}, "evaluate": {"minibatch": 16, "profiles": False}, "tracking": {"enabled": False}}
    for stage in ("pretrain", "classify", "adapt"):
        config[stage] = {**config[stage], "steps": 2, "minibatch": 2, "warmup": 1}
    config["pretrain"]["select"] = "last"
    config["dino"] |= {"teacher_temperature_ramp": 1, "freeze_last_layer": 1}
    config["train"] |= {"cpus_per_worker": 1, "gpus_per_worker": 0, "threads": 1, "knn_every": 0, "log_every": 1}
    file = tmp_path / "paper.yaml"
    file.write_text(yaml.safe_dump(config))
    job("ingest.py", "--config", file)
    job("adapt.py", "--config", file, "--source", "sim_a", "--target", "sim_b", "--method", "coda")
    transfers = pd.read_parquet(io.BytesIO((tmp_path / "results" / "transfers.parquet").read_bytes()))
    assert transfers["method"].tolist() == ["coda", "dual-cb"]
    assert transfers["steps"].tolist() == [2, 0]
    (embeddings, _) = [pd.read_parquet(p) for p in (tmp_path / "results" / "evaluate").glob("*/embeddings.parquet")]
    assert embeddings.filter(like="feature_").shape[1] == 384


def test_a_pool_of_labs_is_trained_on_and_scored_on_another(job, tiny_bucket, tmp_path):
    brief = {"steps": 2, "minibatch": 8}
    stages = {"pretrain": brief, "classify": {**brief, "validate_every": 2}, "adapt": brief}
    matrix = {"sources": [["sim_b", "sim_a"]], "targets": ["sim_a", "sim_c"], "methods": ["standardise", "coda"]}
    model = {"arch": "vit", "patch": 16, "width": 48, "depth": 2, "heads": 3, "init": "fan-in"}  # of one channel
    views = {"tile_crop": 40, "size_global": 32, "size_local": 16, "locals_per_sample": 2}
    file = small(tmp_path, tiny_bucket, ingest={"channels": ["DNA"]}, views=views, model=model, matrix=matrix, **stages)
    job("ingest.py", "--config", file)
    shown = job("matrix.py", "--config", file)
    assert "sim_a+sim_b → sim_c" in shown
    rows = pd.read_parquet(tmp_path / "results" / "transfers.parquet").set_index(["source", "target", "method"])
    pool = "sim_a+sim_b"
    expected = {(pool, "sim_c", method) for method in ("dual-cb", "standardise", "coda")} | {(pool, pool, "dual-cb")}
    assert set(rows.index) == expected
    again = job("adapt.py", "--config", file, "--source", "sim_b+sim_a", "--target", "sim_c", "--method", "coda")
    told = re.search(r"(\d+) stages, (\d+) of them finished before", again)
    assert told
    assert told[1] == told[2]


@pytest.mark.long
def test_every_method_from_the_bucket_to_the_report(job, tiny_bucket, tmp_path):
    config = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
    assert set(config["matrix"]["methods"]) == set(NAMES)
    config |= {"bucket": tiny_bucket.place.model_dump(), "metadata": tiny_bucket.metadata.model_dump()}
    config |= {name: {"address": str(tmp_path / name)} for name in ("tiles", "results")}
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(config))
    job("ingest.py", "--config", file)
    job("matrix.py", "--config", file)
    transfers = pd.read_parquet(tmp_path / "results" / "transfers.parquet")
    across = transfers[transfers["source"] != transfers["target"]]
    assert across.groupby("method")["seed"].apply(set).to_dict() == {method: {0, 1} for method in NAMES}
    assert across["accuracy"].between(0, 1).all()
    again = job("matrix.py", "--config", file)
    told = re.search(r"(\d+) stages, (\d+) of them finished before", again)
    assert told
    assert told[1] == told[2]
    job("report.py", "--config", file, "--out", tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    assert all(method in page for method in NAMES)
    assert "mean ± std over 2 seeds" in page
