"""Predictions of whole plates: what an evaluation says, in tables per plate, for any number of workers, and resumed by plate."""

import io
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import ray
from ray.exceptions import WorkerCrashedError

from coda_ray.config import Config, ConfigError
from coda_ray.learn.exported import DESCRIPTION, WEIGHTS, ModelError, unpack
from coda_ray.pipeline import data
from coda_ray.pipeline.evaluate import TILE_ID, embeddings_of, evaluate, predictions_of
from coda_ray.pipeline.models import export_of, find_model, stored_models
from coda_ray.pipeline.predict import PLATE_ID, PredictionError, _is_done, _Predictor, plates_of, predict, tiles_of, well_table
from coda_ray.pipeline.request import Request
from coda_ray.pipeline.transfer import plan, stages_of
from coda_ray.storage import open_place
from coda_ray.tiles.store import COMPOUND, LABEL, TileIndex
from coda_ray.tiles.stream import UnreadableTilesError
from synthetic import finish, place, random_export, small_config, write_tiles

ROOT = Path(__file__).resolve().parents[2]


def changed(config, **fields):
    """The configuration with other fields of section predict."""
    return Config.model_validate({**config.model_dump(mode="json"), "predict": {"workers": 1, **fields}})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Tiles (one of c is broken), the stages of CODA with random weights, and its exported model."""
    root = tmp_path_factory.mktemp("predict")
    config = small_config(root, stream={"rows_per_task": 16, "tasks": 1, "max_bad_share": 0.01})
    for source in ("a", "b"):
        write_tiles(config, source, batches=2, plates_per_batch=2)
    write_tiles(config, "c", batches=1, plates_per_batch=1)
    (shard,) = (root / "tiles").rglob("cb0p0/shard-00000.npy")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    request = Request("a", "b", "coda", "source", 0)
    transfer = plan(config, request)[-1]
    stages = stages_of([transfer])
    finish(config, stages)
    results = open_place(config.results)
    job = {"key": "job", "config": config.model_dump(mode="json"), "transfers": [], "stages": [s.path for s in stages]}
    results.write("jobs/job.json", json.dumps(job).encode())
    (stored,) = [model for model in stored_models(results) if model.adapted]
    export_of(config, stored).write(open_place(place(root / "model")))
    return changed(config, model=str(root / "model"), sources=["b", "c"]), stored


@pytest.fixture(scope="module")
def model(world):
    return find_model(world[0], world[0].predict.model)


def run(config, model, progress):
    return predict(config, model, tiles_of(config, model), progress)


@pytest.fixture(scope="module")
def predicted(ray_cluster, world, model):
    """All plates of b and c; what was told while they came."""
    told = []
    return run(world[0], model, lambda done, total: told.append((done, total))), told


def tables(folder, name):
    """One table of every plate."""
    return {str(path.parent.relative_to(folder)): pd.read_parquet(path) for path in sorted(Path(folder).rglob(f"{name}.parquet"))}


def test_it_says_what_the_evaluation_says(world, model, predicted):
    config, stored = world
    done, told = predicted
    assert (done.plates, done.before, done.tiles, done.unreadable) == (5, 0, 70, 1)
    assert told[-1] == (70, 70)
    assert "5 plates, 70 tiles" in done.text
    assert "tiles/s, 1 worker(s)" in done.text
    assert done.folder == f"{config.results.address}/predictions/{model.key}"
    stage = evaluate(config, data.load_tiles(config, "b"), "b", stored.classifier, stored.adapted)
    stage.run(config, None)
    images = pd.concat(tables(done.folder, "images").values(), ignore_index=True).set_index(TILE_ID)
    images = images.loc[["b"]]
    for expected in (predictions_of(config, stage), embeddings_of(config, stage)):
        expected = expected.set_index(TILE_ID)
        columns = list(expected.filter(regex="^probability_|^feature_"))
        assert columns
        np.testing.assert_allclose(images[columns], expected.loc[images.index, columns], rtol=1e-5, atol=1e-6)
    assert (images["predicted"] == predictions_of(config, stage).set_index(TILE_ID)["predicted"].loc[images.index]).all()


def test_tables_have_what_profiles_have_and_no_label(predicted, model):
    for name in ("images", "wells"):
        (table, *_) = tables(predicted[0].folder, name).values()
        assert LABEL not in table
        assert set(table["Metadata_Model"]) == {model.key}
        assert {COMPOUND, *PLATE_ID, "Metadata_Well"} <= set(table)
        assert {"predicted", "confidence", "predicted_2", "predicted_3"} <= set(table)
        assert [f"probability_moa {i}" for i in range(3)] == list(table.filter(like="probability_"))
        assert len(table.filter(like="feature_").columns) == 16
        np.testing.assert_allclose(table.filter(like="probability_").sum(axis=1), 1, rtol=1e-5)
    folder = Path(predicted[0].folder) / "b" / "b0" / "bb0p0"
    assert sorted(path.name for path in folder.iterdir()) == [
        "images.parquet", "plate.json", "plate.png", "unreadable.parquet", "wells.parquet",
    ]  # fmt: skip
    assert (folder / "plate.png").read_bytes().startswith(b"\x89PNG")
    note = json.loads((folder / "plate.json").read_text())
    assert (note["model"], note["images"], note["wells"], note["unreadable"]) == (model.key, 14, 7, 0)


def test_a_well_is_the_mean_of_its_images(predicted):
    for path, wells in tables(predicted[0].folder, "wells").items():
        images = tables(predicted[0].folder, "images")[path]
        assert len(wells) == 7
        assert wells["Metadata_Image_Count"].tolist() == images.groupby("Metadata_Well").size().tolist()
        for _, well in wells.iterrows():
            own = images[images["Metadata_Well"] == well["Metadata_Well"]]
            mean = own.filter(like="probability_").to_numpy(np.float64).mean(0)
            np.testing.assert_allclose(well.filter(like="probability_").to_numpy(float), mean, rtol=1e-5)
            features = own.filter(like="feature_").to_numpy(np.float64).mean(0)
            np.testing.assert_allclose(well.filter(like="feature_").to_numpy(float), features, rtol=1e-4, atol=1e-6)
            assert well["predicted"] == f"moa {mean.argmax()}"
            assert [well[f"predicted{place}"] for place in ("", "_2", "_3")] == [f"moa {i}" for i in np.argsort(-mean)]
            assert well["confidence"] == pytest.approx(mean.max(), rel=1e-5)
            assert well["image_agreement"] == (own["predicted"] == well["predicted"]).mean()


def test_replicates_agree_among_the_other_wells_of_the_compound():
    names = [("A01", "c", 0), ("A02", "c", 0), ("A03", "c", 1), ("A04", "d", 1), ("A05", None, 1)]
    images = pd.DataFrame(
        [
            {
                "Metadata_Source": "s", "Metadata_Batch": "b", "Metadata_Plate": "p", "Metadata_Well": well, "Metadata_Site": "1",
                COMPOUND: compound, "predicted": "xy"[code], "probability_x": 1.0 - code, "probability_y": float(code),
                "feature_0": 0.0,
            }
            for well, compound, code in names
        ]
    )  # fmt: skip
    np.testing.assert_equal(well_table(images)["replicate_agreement"].to_numpy(), [0.5, 0.5, 0.0, np.nan, np.nan])
    assert len(well_table(images.iloc[:0])) == 0


def test_it_goes_on_where_it_stopped_and_two_workers_say_the_same(world, model, predicted):
    config, folder = changed(world[0], sources=["b", "c"], workers=2), Path(predicted[0].folder)
    before = tables(folder, "images")
    for plate in ("b0/bb0p0", "b1/bb1p1"):
        (folder / "b" / plate / "plate.json").unlink()
        (folder / "b" / plate / "images.parquet").write_bytes(b"cut short")
    done = run(config, model, lambda *_: None)
    assert (done.plates, done.before, done.tiles, done.workers) == (2, 3, 28, 2)
    after = tables(folder, "images")
    assert before.keys() == after.keys()
    for path, table in after.items():
        pd.testing.assert_frame_equal(table, before[path], rtol=1e-5, atol=1e-6)
    assert run(config, model, lambda *_: None).text == f"nothing to do; 5 plates were there before: {folder}"


def test_tiles_that_changed_are_predicted_anew(world, model, predicted):
    index = plates_of(tiles_of(changed(world[0], sources=["b"]), model))[0]
    out = open_place(place(Path(predicted[0].folder)))
    assert _is_done(out, index, model, "fp32")
    assert not _is_done(out, index, model, "bf16")
    assert not _is_done(out, TileIndex(index.frame.assign(crc32=0), index.folder, index.channels), model, "fp32")


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"model": "x'])
def test_a_damaged_note_is_named(world, model, tmp_path, content):
    index = plates_of(tiles_of(changed(world[0], sources=["b"]), model))[0]
    out = open_place(place(tmp_path))
    out.write("b/b0/bb0p0/plate.json", content)
    with pytest.raises(PredictionError, match=r"b/b0/bb0p0/plate\.json: is damaged \(.*\); delete it, and"):
        _is_done(out, index, model, "fp32")


def test_a_worker_that_dies_is_told(world, model, tmp_path, monkeypatch):
    def dies(*args):
        yield from ()
        raise WorkerCrashedError

    monkeypatch.setattr("coda_ray.pipeline.predict._stream", dies)
    with pytest.raises(PredictionError, match=r"WorkerCrashedError: .*finished plates are kept"):
        run(changed(world[0], out=str(tmp_path)), model, lambda *_: None)


def test_broken_tiles_are_listed(predicted):
    done, _ = predicted
    assert "1 tiles could not be read; they are in unreadable.parquet" in done.text
    lost = {path: table for path, table in tables(done.folder, "unreadable").items() if len(table)}
    assert list(lost) == ["c/b0/cb0p0"]
    assert lost["c/b0/cb0p0"][["Metadata_Well", "Metadata_Site"]].to_numpy().tolist() == [["A06", "1"]]
    assert "damaged tile" in lost["c/b0/cb0p0"]["reason"].item()
    images = tables(done.folder, "images")["c/b0/cb0p0"]
    assert len(images) == 13
    assert images["confidence"].notna().all()


def test_a_minibatch_without_a_readable_tile_is_not_a_number(ray_cluster, world, model):
    predictor = _Predictor([ray.put(model)], world[0].train)
    nothing = {name: np.zeros(2, bool) for name in ("sample", "row", "readable", "replaced", "reason")}
    found = predictor({**nothing, "tile": np.zeros((2, 2, 32, 32), np.uint8)})
    assert np.isnan(found["probabilities"]).all()
    assert np.isnan(found["embedding"]).all()


@pytest.mark.slow
def test_many_broken_tiles_stop_and_leave_no_plate(ray_cluster, tmp_path, model):
    config = small_config(tmp_path)
    write_tiles(config, "b", batches=1, plates_per_batch=1)
    (shard,) = (tmp_path / "tiles").rglob("shard-00000.npy")
    shard.write_bytes(shard.read_bytes()[:-5000])
    with pytest.raises(UnreadableTilesError, match=r"delete the folder of their plate"):
        run(changed(config), model, lambda *_: None)
    assert not list(tmp_path.rglob("plate.json.*"))
    assert not list(Path(config.results.address).rglob("plate.json"))


def test_a_plate_without_a_tile_that_can_be_read_has_no_tables_and_the_others_have(ray_cluster, tmp_path, model):
    config = small_config(tmp_path, stream={"rows_per_task": 16, "tasks": 1, "max_bad_share": 0.5})
    write_tiles(config, "b", batches=1, plates_per_batch=3)
    (shard,) = (tmp_path / "tiles").rglob("bb0p1/shard-00000.npy")
    shard.unlink()
    with pytest.raises(UnreadableTilesError, match=r"no tile of 1 plate\(s\) .*: b/b0/bb0p1: .*shard is missing"):
        run(changed(config), model, lambda *_: None)
    written = {path.parent.name for path in Path(config.results.address).rglob("plate.json")}
    assert written == {"bb0p0", "bb0p2"}


def test_what_cannot_be_predicted_is_refused_before_ray(world, model):
    config = world[0]
    other = config.model_copy(update={"ingest": config.ingest.model_copy(update={"scale": 1.0})})
    with pytest.raises(ModelError, match=r"ingest.scale = 1.0, the model wants 0.5; ingest them with the model's settings"):
        tiles_of(other, model)
    with pytest.raises(ModelError, match=r"ingest.channels = \['ER', 'DNA'\], the model wants \['DNA', 'ER'\]"):
        tiles_of(config.model_copy(update={"ingest": config.ingest.model_copy(update={"channels": ["ER", "DNA"]})}), model)
    with pytest.raises(ConfigError, match=r"predict.plates = 'x': b has no such finished plate"):
        tiles_of(changed(config, sources=["b"], plates=["x"]), model)
    with pytest.raises(FileNotFoundError, match=r"no finished plate of 'd' prepared with these settings"):
        tiles_of(changed(config, sources=["d"]), model)
    nowhere = config.model_copy(update={"tiles": place(Path(config.tiles.address) / "nowhere")})
    with pytest.raises(FileNotFoundError, match=r"run jobs/ingest.py, or give --predict.ingest true"):
        tiles_of(changed(nowhere), model)


def job(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["jobs/predict.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "jobs" / "predict.py"), run_name="__main__")
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


def test_the_job_tells_what_is_wrong_in_one_line(monkeypatch, capsys, tmp_path):
    assert job(monkeypatch, capsys) == (
        2, "", "jobs/predict.py: predict.model is unset; give --predict.model ADDRESS (see jobs/export.py)\n",
    )  # fmt: skip
    code, _, told = job(monkeypatch, capsys, "--predict.model", tmp_path)
    assert (code, len(told.splitlines())) == (2, 1)
    assert "there is no model; give an exported folder" in told
    code, _, told = job(monkeypatch, capsys, "--predict.model", "gs://bucket/model")
    assert code == 2
    assert "only s3://bucket/prefix and folders are known" in told


def test_the_job_does_not_wait_for_a_gpu_that_no_node_has(ray_cluster, world, monkeypatch, capsys, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(world[0].model_dump_json())
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    out = ["--predict.out", tmp_path / "out"]
    code, _, told = job(monkeypatch, capsys, "--config", file, *out, "--train.gpus_per_worker", 1)
    assert code == 2
    assert "train.gpus_per_worker = 1: no node of this cluster has so much (at most 0 GPU)" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_raw_images_are_prepared_first(monkeypatch, capsys, tmp_path, tiny_bucket):
    """A model whose preparation is that of the configuration, and plates that are in the bucket alone."""
    config = small_config(
        tmp_path, bucket=tiny_bucket.place.model_dump(), metadata=tiny_bucket.metadata.model_dump(), ingest={"scale": 1.0}
    )
    files = random_export(config)
    for name, content in files.items():
        open_place(place(tmp_path / "model")).write(name, content)
    file = tmp_path / "config.yaml"
    file.write_text(config.model_dump_json())
    wanted = ["--config", file, "--predict.model", tmp_path / "model", "--predict.ingest", "true", "--predict.sources", "sim_a"]
    code, said, told = job(monkeypatch, capsys, *wanted, "--predict.out", tmp_path / "out")
    assert code == 0, told
    found = tables(tmp_path / "out", "wells")
    assert {path.split("/")[1] for path in found} == {"sim_a"}
    assert "sites/s" in said
    assert "tiles/s" in said
    assert "nothing to do" in job(monkeypatch, capsys, *wanted, "--predict.out", tmp_path / "out")[1]
    key = unpack(files[DESCRIPTION], files[WEIGHTS], "").key
    index = pd.concat([pd.read_parquet(io.BytesIO(path.read_bytes())) for path in (tmp_path / "tiles").rglob("index.parquet")])
    images = pd.concat(tables(tmp_path / "out" / key, "images").values())
    assert len(images) == len(index)
