"""Several labs as one source: what is one pool's and what stays each lab's own, beside the obvious way, tile by tile."""

import numpy as np
import pandas as pd
import pytest

from coda_ray.config import Config, ConfigError
from coda_ray.jump.prepare import preparation_of
from coda_ray.pipeline import data
from coda_ray.pipeline.data import DataError
from coda_ray.pipeline.dry_run import survey
from coda_ray.pipeline.evaluate import write_predictions
from coda_ray.pipeline.matrix import requests_of
from coda_ray.pipeline.moments import plate_names
from coda_ray.pipeline.record import data_used
from coda_ray.pipeline.train_stages import pretrain
from coda_ray.pipeline.transfer import Request, plan, score
from coda_ray.storage import open_place
from coda_ray.tiles.store import COMPOUND, LABEL, TileStore
from synthetic import small_config, write_tiles

LAB, BATCH, PLATE = "Metadata_Source", "Metadata_Batch", "Metadata_Plate"
POOL = "a+b"
CODA = Request(POOL, "c", "coda", "source", 0)


def world(root, **sections) -> Config:
    """Three labs; `a` and `b` have batches and plates of the same names."""
    config = small_config(root, **sections)
    for lab in "abc":
        write_tiles(config, lab, batches=2, plates_per_batch=2, plates_of="a" if lab == "b" else None)
    return config


@pytest.fixture(scope="module")
def labs(tmp_path_factory):
    return world(tmp_path_factory.mktemp("pools"))


def relabelled(config, lab, change):
    """Change every table of a lab."""
    store = TileStore.open(open_place(config.tiles), preparation_of(config))
    for path in store.plates([lab]):
        store.write_plate_index(path, change(store.plate_index(path)))
    data.forget()


def test_a_pool_is_the_tiles_of_its_labs(labs):
    whole = data.load_tiles(labs, POOL).frame
    alone = pd.concat([data.load_tiles(labs, lab).frame for lab in "ab"], ignore_index=True)
    pd.testing.assert_frame_equal(whole, alone)


def test_every_lab_of_a_pool_holds_out_its_own_plate(labs):
    chosen = labs.model_copy(update={"held_out": {"a": "ab0p1"}})
    assert data.held_out_plates(chosen, POOL) == {"a": "ab0p1", "b": "ab1p1"}
    frame = data.load_tiles(chosen, POOL).frame
    held = [(lab, plate) in {("a", "ab0p1"), ("b", "ab1p1")} for lab, plate in zip(frame[LAB], frame[PLATE], strict=True)]
    held = np.array(held)
    pd.testing.assert_frame_equal(data.held_out_tiles(chosen, POOL).frame, frame[held].reset_index(drop=True))
    pd.testing.assert_frame_equal(data.training_tiles(chosen, POOL).frame, frame[~held].reset_index(drop=True))
    # The plate of that name is trained on in the other lab.
    trained = data.training_tiles(chosen, POOL).frame
    assert {("b", "ab0p1"), ("a", "ab1p1")} <= set(zip(trained[LAB], trained[PLATE], strict=True))
    with pytest.raises(DataError, match=r"held_out\.b = 'p': no such plate; b has ab0p0"):
        data.training_tiles(labs.model_copy(update={"held_out": {"b": "p"}}), POOL)


@pytest.mark.parametrize("across", ["batch", "plate"])
def test_partners_are_the_same_compound_in_another_batch_or_lab(labs, across):
    tiles = data.unlabelled(data.training_tiles(labs, POOL))
    frame, partners = tiles.pool.frame, tiles.partners(across)
    unit = list(zip(frame[LAB], frame[{"batch": BATCH, "plate": PLATE}[across]], strict=True))
    drawn = set()
    for row in range(len(frame)):
        expected = {
            other for other in range(len(frame)) if frame[COMPOUND][other] == frame[COMPOUND][row] and unit[other] != unit[row]
        }
        draws = partners.draw(np.full(200, row), (np.arange(200) + 0.5) / 200)
        assert set(draws) == expected
        drawn |= {(frame[LAB][row], frame[LAB][other]) for other in expected}
    assert drawn == {("a", "a"), ("a", "b"), ("b", "a"), ("b", "b")}


def test_one_batch_in_each_lab_is_enough_for_pairs(tmp_path):
    config = small_config(tmp_path)
    for lab in "ab":
        write_tiles(config, lab, batches=1, plates_per_batch=2)
    with pytest.raises(DataError, match="have no partner"):
        pretrain(config, "a", objective="dino-cb", seed=0)
    assert pretrain(config, POOL, objective="dino-cb", seed=0).note is None


def test_a_pool_knows_the_classes_of_all_its_labs_and_holds_out_compounds_of_each(tmp_path):
    config = world(tmp_path, split="compounds")

    def another(frame):
        missing = frame[LABEL] == "moa 0"
        named = frame[COMPOUND].where(~missing, frame[COMPOUND] + "x")
        return frame.assign(**{LABEL: frame[LABEL].where(~missing, "moa x"), COMPOUND: named})

    relabelled(config, "b", another)
    assert data.classes_of(config, "a") == ["moa 0", "moa 1", "moa 2"]
    assert data.classes_of(config, POOL) == ["moa 0", "moa 1", "moa 2", "moa x"]
    held_out = data.held_out_compounds(config, POOL)
    assert len(held_out) == 4
    assert set(data.held_out_compounds(config, "a")) < set(held_out)
    assert not set(held_out) & set(data.training_tiles(config, POOL).frame[COMPOUND])
    assert not set(held_out) & set(data.target_tiles(config, POOL, "c").frame[COMPOUND])


def test_the_smallest_tiles_of_a_pool_are_told_with_their_lab(labs):
    views = labs.views.model_copy(update={"tile_crop": 33})
    with pytest.raises(DataError, match=r"views\.tile_crop = 33: a has tiles of 32 px"):
        data.load_tiles(labs.model_copy(update={"views": views}), POOL)
    with pytest.raises(FileNotFoundError, match="no finished plate of 'd'"):
        data.load_tiles(labs, "a+d")


def test_a_job_names_the_tiles_of_each_lab(labs):
    told = {one["name"]: (one["context"], one["fingerprint"]) for one in data_used(labs, [(POOL, "c"), (POOL, POOL)])}
    assert told == {
        lab: (context, data.load_tiles(labs, lab).fingerprint)
        for lab, context in (("a", "source, target"), ("b", "source, target"), ("c", "target"))
    }


def test_plates_of_one_name_are_counted_in_each_lab(labs):
    index = data.training_tiles(labs, POOL)
    assert [index.count(unit) for unit in ("source", "batch", "plate")] == [2, 4, 6]
    assert len(set(plate_names(index))) == 6
    # As they were named before there were pools.
    assert set(plate_names(data.training_tiles(labs, "b"))) == {"b0/ab0p0", "b0/ab0p1", "b1/ab1p0"}


def test_at_home_a_pool_is_scored_on_the_wells_of_every_labs_held_out_plate(labs):
    """Those of `b` are named rightly and those of `a` are not, though plates and wells have the same names."""
    (within,) = plan(labs, Request(POOL, POOL, "supervised", "plate", 0))
    assert (within.identity["granularity"], within.identity["unit"]) == ("plate", "a/ab1p1+b/ab1p1")
    frame, classes = data.held_out_tiles(labs, POOL).frame, within.evaluation.needs[0].inputs["classes"]
    right = pd.Categorical(frame[LABEL], categories=classes).codes
    told = np.where(frame[LAB] == "b", right, (right + 1) % len(classes))
    folder = open_place(labs.results).child(within.evaluation.path)
    metadata = frame.filter(like="Metadata_").drop(columns=LABEL)
    write_predictions(
        folder, metadata, classes, np.eye(len(classes), dtype=np.float32)[told], np.zeros((len(frame), 2), np.float32)
    )
    (record,) = score(labs, open_place(labs.results), [within])
    assert (record["n_images"], record["n_wells"], record["n_compounds"]) == (24, 12, 6)
    assert (record["accuracy"], record["well_accuracy"]) == (0.5, 0.5)


def test_no_lab_of_a_pool_and_no_pool_is_a_target(labs):
    with pytest.raises(ConfigError, match=r"target a: source a\+b was trained on it; leave it out of the pool"):
        plan(labs, Request(POOL, "a", "coda", "source", 0))
    with pytest.raises(ConfigError, match=r"target a\+b: a pool of labs can be a source alone; give one lab"):
        plan(labs, Request("c", POOL, "coda", "source", 0))


def test_a_matrix_of_pools_is_all_but_one_to_the_one():
    matrix = {"sources": ["c", ["b", "a"], "b + c"], "targets": ["a", "b", "c"], "methods": ["coda"]}
    cells = [(r.source, r.target, r.method) for r in requests_of(Config.model_validate({"matrix": matrix}))]
    across = {("c", "a"), ("c", "b"), ("a+b", "c"), ("b+c", "a")}
    within = {(source, source) for source in ("c", "a+b", "b+c")}
    assert len(cells) == len(set(cells))
    assert set(cells) == {(*pair, "coda") for pair in across} | {(*pair, "dual-cb") for pair in within}


def test_the_dry_run_counts_each_lab_of_a_pool(labs):
    found = survey(labs, [CODA, Request(POOL, POOL, "dual-cb", "plate", 0)])
    sources = found.sources.set_index("source")
    assert sources["plates"].to_dict() == dict.fromkeys("abc", 4)
    assert sources["held_out"].to_dict() == {"a": "ab1p1", "b": "ab1p1", "c": ""}
    stages = found.stages.set_index("kind")
    assert (stages.loc["pretrain", "source"], stages.loc["pretrain", "plates"], stages.loc["pretrain", "tiles"]) == (POOL, 6, 84)
    within = found.stages[found.stages["title"].str.endswith("a+b's held-out plate a/ab1p1+b/ab1p1")].iloc[0]
    assert (within["source"], within["plates"], within["tiles"]) == (POOL, 2, 28)
