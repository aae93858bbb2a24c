"""The dry run: the counts of the real plan, from real metadata by hand, and from planned and ingested plates alike."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import ray

from coda_ray.config import Config, Place, build_config, dump_config
from coda_ray.jump.ingest import run_ingest
from coda_ray.jump.prepare import preparation_of
from coda_ray.pipeline.data import DataError
from coda_ray.pipeline.dry_run import show, survey
from coda_ray.pipeline.matrix import requests_of
from coda_ray.pipeline.request import Request
from coda_ray.pipeline.transfer import plan, stages_of
from coda_ray.storage import open_place
from coda_ray.tiles.store import TileStore
from coda_ray.training.checkpoints import write_tensors
from synthetic import small_config, write_tiles

ROOT = Path(__file__).resolve().parents[2]
COUNTS = ["kind", "title", "source", "plates", "tiles", "steps", "minibatch", "images_per_step", "images"]


def paper(metadata, root, *overrides) -> Config:
    places = ["--metadata.address", str(metadata), "--tiles.address", f"{root}/tiles", "--results.address", f"{root}/results"]
    return build_config(Config, str(ROOT / "configs" / "paper.yaml"), [*places, *overrides])


def survey_of(config):
    return survey(config, requests_of(config))


def counted(found):
    return found.stages.dropna(subset="tiles")


def row(stages, title):
    (found,) = stages[stages["title"] == title].to_dict("records")
    return found


def test_tiles_of_both_readings_of_the_released_channels_keep_apart(tmp_path):
    other = paper(tmp_path, tmp_path, "--ingest.channels", "DNA,RNA,Mito")
    prepared = [preparation_of(config) for config in (paper(tmp_path, tmp_path), other)]
    assert [preparation["channels"] for preparation in prepared] == [["DNA", "ER", "Mito"], ["DNA", "RNA", "Mito"]]
    assert len({TileStore.open(open_place(other.tiles), preparation).folder.address() for preparation in prepared}) == 2


@pytest.fixture(scope="module")
def small_part(jump_metadata, tmp_path_factory):
    root = tmp_path_factory.mktemp("part")
    overrides = [
        "--matrix.sources",
        "source_8",
        "--matrix.targets",
        "source_8,source_10",
        "--matrix.granularities",
        "source,batch",
    ]
    return root, survey_of(paper(jump_metadata, root, *overrides, "--matrix.seeds", "0"))


def test_all_wells_take_more_steps(jump_metadata, tmp_path):
    config = paper(jump_metadata, tmp_path, "--learn-from", "all")
    stages = survey(config, [Request("source_8", "source_10", "coda", "source", 0)]).stages
    got = row(stages, "pretrain dino-cb on source_8, seed 0")
    assert (got["tiles"], got["steps"]) == (3 * 384 * 9, 300 * (3 * 384 * 9 // 128)) == (10_368, 24_300)


def test_steps_of_a_real_pair_are_those_counted_by_hand(small_part):
    root, found = small_part
    stages = found.stages
    # 140 of the 384 wells of a plate have a MoA, 3 more one of these compounds. 4 plates x 9 sites, one plate held out; 6 plates
    # x 6 sites, less 2 wells that the well table lacks.
    training, labelled, target, learnt = 3 * 143 * 9, 3 * 140 * 9, (6 * 384 - 2) * 6, (6 * 143 - 2) * 6
    for method, per_sample in (("dino-cb", 2), ("dino", 1)):
        got = row(stages, f"pretrain {method} on source_8, seed 0")
        assert (got["tiles"], got["steps"]) == (training, 300 * (training // 128)) == (3_861, 9_000)
        assert (got["minibatch"], got["images_per_step"]) == (128, 128 * per_sample)
        assert got["images"] == 9_000 * 128 * per_sample
        assert got["gpu_hours"] == pytest.approx(9_000 * 128 / 250 / 3600)
    assert row(stages, "classify dual-cb on source_8, seed 0")["steps"] == 50 * (labelled // 128) == 1_450
    whole = row(stages, "adapt coda source_8 to source_10 source source_10, seed 0")
    assert (whole["tiles"], whole["steps"], whole["minibatch"]) == (learnt, 300 * (learnt // 128), 128) == (5_136, 12_000, 128)
    batch = row(stages, "adapt coda source_8 to source_10 batch 2021_08_03_U2OS_48_hr_run12, seed 0")
    assert (batch["plates"], batch["steps"], batch["minibatch"]) == (1, whole["steps"], 64)
    seen = row(stages, "evaluate classify supervised on source_8, seed 0 on source_10")
    assert (seen["tiles"], seen["images"], seen["steps"]) == (target, target, 54)
    assert counted(found)["planned"].all()
    assert not found.stages["finished"].any()
    assert list(root.iterdir()) == []


def test_a_real_pair_needs_these_stages_and_no_other(small_part):
    _, found = small_part
    kinds = found.stages["kind"].value_counts().to_dict()
    # ODA and CODA: the whole target and each of 6 batches. Predictions: 3 unadapted models on target and held-out plate.
    # Profiles: every prediction of the target.
    assert kinds == {
        "pretrain": 2,
        "classify": 3,
        "adapt": 2 * (1 + 6),
        "evaluate": 3 + 3 + 2 * (1 + 6),
        "profile": 3 + 2 * (1 + 6),
    }
    assert found.stages["title"].is_unique


def test_bytes_of_a_real_pair_are_those_of_tiles_and_weights(small_part):
    _, found = small_part
    sources = found.sources.set_index("source")
    assert sources.loc["source_8", "tile_bytes"] == 13_824 * 3 * 512 * 512
    assert sources.loc["source_10", "tile_bytes"] == 13_812 * 3 * 500 * 500
    assert sources.loc["source_10", "raw_bytes"] == 13_812 * 3 * 1000 * 1000 * 2
    # DeiT-S without its head; the paper counts 43.5 million parameters for the dual model of 54 classes.
    supervised = row(found.stages, "classify supervised on source_8, seed 0")["bytes"]
    assert supervised == pytest.approx(4 * 21.7e6, rel=0.01)
    assert row(found.stages, "classify dual-cb on source_8, seed 0")["bytes"] == pytest.approx(4 * 43.5e6, rel=0.01)
    seen = row(found.stages, "evaluate classify supervised on source_8, seed 0 on source_10")
    assert seen["bytes"] == 13_812 * 4 * (54 + 384)


@pytest.mark.slow
def test_the_papers_matrix_from_the_real_tables(jump_metadata, tmp_path):
    config = paper(jump_metadata, tmp_path)
    running = ray.is_initialized()
    found = survey_of(config)
    seeds, sources, targets = len(config.matrix.seeds), 4, 6
    pairs = sources * (targets - 1)
    # Unadapted: supervised, dual-dino, dual-cb; adapted: ODA, CODA.
    expected = {"pretrain": 2 * sources, "classify": 3 * sources, "adapt": 2 * pairs, "evaluate": 5 * pairs + 3 * sources}
    expected["profile"] = 5 * pairs
    assert found.stages["kind"].value_counts().to_dict() == {kind: seeds * number for kind, number in expected.items()}
    table = found.sources.set_index("source")
    published = {
        "source_3": (25, 13, 85_409), "source_5": (24, 23, 82_256), "source_8": (4, 4, 13_824),
        "source_11": (7, 4, 23_373), "source_7": (7, 7, 24_192), "source_10": (6, 6, 13_812),
    }  # fmt: skip
    assert set(table.index) == set(published)
    for source, (plates, batches, images) in published.items():
        assert tuple(table.loc[source, ["plates", "batches"]]) == (plates, batches)
        assert images <= table.loc[source, "tiles"] <= 1.04 * images
        assert (table.loc[source, "tiles"] == images) == (source in ("source_7", "source_8", "source_10"))
    assert (table["classes"] == 54).all()
    steps = {source: row(found.stages, f"pretrain dino-cb on {source}, seed 2")["steps"] for source in config.matrix.sources}
    assert steps["source_3"] == 300 * (24 * 143 * 9 // 128) == 72_300
    assert steps["source_8"] == 9_000
    for source, plate in config.held_out.items():
        assert row(found.stages, f"evaluate classify supervised on {source}, seed 0 on {source}'s held-out plate {plate}")
    assert ray.is_initialized() == running


def test_the_papers_fields_per_well_are_those_of_the_microscope_table(jump_metadata):
    table = pd.read_csv(jump_metadata / "microscope_config.csv").set_index("Metadata_Source")["Metadata_Sites_Per_Well"]
    estimate = paper(jump_metadata, "unused").estimate
    assert estimate.sites_per_well == {source: table[source] for source in estimate.sites_per_well}
    assert set(estimate.image_px) == set(estimate.sites_per_well)


def test_a_store_that_is_there_is_counted_as_the_real_plan_counts_it(tmp_path):
    config = small_config(tmp_path, pretrain={"steps": "3 epochs"}, estimate={"dino_per_s": 7.0})
    for source in ("a", "b"):
        write_tiles(config, source, batches=2, plates_per_batch=2)
    requests = [Request("a", "b", "coda", "batch", 0), Request("a", "b", "supervised", "source", 0)]
    found = survey(config, requests)
    stages = stages_of(transfer for request in requests for transfer in plan(config, request))
    assert found.stages["title"].tolist() == [stage.title for stage in stages]
    assert not found.stages["planned"].any()
    titles = found.stages.set_index("number")["title"]
    needed = {row["title"]: [titles[number] for number in row["needs"]] for row in found.stages.to_dict("records")}
    assert needed == {stage.title: [need.title for need in stage.needs] for stage in stages}
    for stage, got in zip(stages, found.stages.to_dict("records"), strict=True):
        if stage.kind != "evaluate":
            loop, run = stage.make(open_place(config.results), None)
            assert (got["steps"], got["minibatch"]) == (run.steps, run.optimisation.minibatch)
            assert (got["bytes"] > 0, loop.__name__) == (True, "train_loop")
    dino = row(found.stages, "pretrain dino-cb on a, seed 0")
    # 3 plates of 14 tiles, 5 mini-batches of 8 an epoch.
    assert (dino["tiles"], dino["steps"], dino["images"]) == (42, 15, 15 * 8 * 2)
    assert dino["gpu_hours"] == pytest.approx(15 * 8 / 7 / 3600)
    assert pd.isna(row(found.stages, "classify supervised on a, seed 0")["gpu_hours"])


def test_bytes_are_those_that_the_objective_saves(tmp_path):
    config = small_config(tmp_path)
    for source in ("a", "b"):
        write_tiles(config, source)
    requests = [Request("a", "b", "oda", "source", 0), Request("a", "b", "supervised", "source", 0)]
    found = survey(config, requests).stages
    for stage in stages_of(transfer for request in requests for transfer in plan(config, request)):
        if stage.kind in ("pretrain", "classify") and not stage.needs:
            _, run = stage.make(open_place(config.results), None)
            write_tensors(open_place(config.results), "weights", run.build().objective.state_dict())
            header = 4096
            saved = (tmp_path / "results" / "weights").stat().st_size
            assert 0 <= saved - row(found, stage.title)["bytes"] < 3 * header


def test_a_finished_stage_is_marked_and_its_speed_counts_for_the_others(tmp_path):
    config = small_config(tmp_path, estimate={"dino_per_s": 1.0, "inference_per_s": 2.0})
    for source in ("a", "b"):
        write_tiles(config, source)
    requests = [Request("a", "b", "oda", "source", 0)]
    before = survey(config, requests)
    assert before.rates["dino"] == (1.0, "assumed, estimate.dino_per_s")
    first = next(stage for stage in stages_of(plan(config, requests[0])) if stage.kind == "pretrain")
    results = open_place(config.results)
    results.write(f"{first.path}/done.json", json.dumps({"steps": 4, "seconds": 2.0, "workers": 2}).encode())
    after = survey(config, requests)
    assert after.stages["finished"].tolist() == [stage.key == first.key for stage in stages_of(plan(config, requests[0]))]
    # 4 steps of 8 samples in 2 s on each of 2 workers.
    assert after.rates["dino"] == (8.0, "median of 1 finished stages")
    assert row(after.stages, first.title)["gpu_hours"] == pytest.approx(4 / 3600)
    adapted = after.stages[after.stages["kind"] == "adapt"].iloc[0]
    assert adapted["gpu_hours"] == pytest.approx(adapted["steps"] * 8 / 8.0 / 3600)


@pytest.mark.slow
def test_planned_and_ingested_plates_give_the_same_counts(tiny_bucket, tmp_path):
    config = Config(
        bucket=Place(address=str(tiny_bucket.folder)),
        metadata=Place(address=str(tiny_bucket.folder / "metadata")),
        tiles=Place(address=str(tmp_path / "tiles")),
        results=Place(address=str(tmp_path / "results")),
        ingest={"sources": ["sim_a", "sim_b"], "plate_sample": 4},
        model={"arch": "vit", "patch": 8, "width": 16, "depth": 1, "heads": 2, "init": "random"},
        views={"tile_crop": 48, "size_global": 32, "size_local": 16},
        pretrain={"minibatch": 4}, classify={"minibatch": 4}, adapt={"minibatch": 4, "minibatch_unit": 2},
        matrix={"sources": ["sim_a"], "targets": ["sim_a", "sim_b"], "granularities": ["source", "batch", "plate"]},
        estimate={"sites_per_well": {"sim_a": 1, "sim_b": 1}, "image_px": {"sim_a": (96, 96), "sim_b": (96, 96)}},
    )  # fmt: skip
    planned = survey_of(config)
    assert counted(planned)["planned"].all()
    assert (planned.sources["planned"] == planned.sources["plates"]).all()
    run_ingest(config, lambda progress: None)
    known = survey_of(config)
    assert not known.stages["planned"].any()
    pd.testing.assert_frame_equal(known.stages[COUNTS], planned.stages[COUNTS])
    same = ["source", "plates", "batches", "wells", "compounds", "classes", "labelled", "tiles", "tile_px", "tile_bytes"]
    pd.testing.assert_frame_equal(known.sources[same], planned.sources[same])
    shutil.rmtree(next((tmp_path / "tiles").glob("*/sim_b/*/*")))
    partly = survey_of(config)
    assert partly.sources["planned"].tolist() == [0, 1]
    pd.testing.assert_frame_equal(partly.stages[COUNTS], planned.stages[COUNTS])


def test_what_cannot_be_planned_is_told_with_its_remedy(tmp_path, jump_metadata):
    requests = [Request("source_8", "source_10", "oda", "source", 0)]
    config = paper(jump_metadata, tmp_path)
    fewer = config.estimate.model_copy(update={"image_px": {"source_8": (1024, 1024)}})
    with pytest.raises(DataError, match=r"estimate\.image_px has no source_10, and source_10/2021_.* is not ingested yet; add"):
        survey(config.model_copy(update={"estimate": fewer}), requests)
    with pytest.raises(DataError, match=r"source_10: none of its plates is in .*ingest\.sources"):
        survey(paper(jump_metadata, tmp_path, "--ingest.sources", "source_8"), requests)
    with pytest.raises(DataError, match=r"source_10: none of its plates is in .*metadata\.address = .*nowhere"):
        survey(paper(tmp_path / "nowhere", tmp_path), requests)


def test_the_job_prints_the_plan_without_ray_and_writes_nothing(tmp_path, capsys):
    config = small_config(
        tmp_path, estimate={"dino_per_s": 0.55}, matrix={"sources": ["a"], "targets": ["b"], "methods": ["supervised", "coda"]}
    )
    for source in ("a", "b"):
        write_tiles(config, source, batches=3)
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config))
    # Nothing listens there: starting Ray would fail.
    environment = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1"}
    command = [sys.executable, "jobs/matrix.py", "--config", str(file), "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pretrain dino-cb on a, seed 0" in done.stdout
    assert f"tiles: {config.tiles.address}" in done.stdout
    assert f"results: {config.results.address}" in done.stdout
    assert "ab2p0" in done.stdout  # the source's held-out plate
    assert "dino: 0.55 samples/s per GPU (assumed, estimate.dino_per_s)" in done.stdout
    assert "GPU h –: no rate is known" in done.stdout
    assert not (tmp_path / "results").exists()
    with pytest.raises(SystemExit) as end:
        show(config, [Request("a", "c", "supervised", "source", 0)])
    assert end.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
