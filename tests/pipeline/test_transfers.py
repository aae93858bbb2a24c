"""Transfers end to end on a small tile store: what runs, what is scored, and what no label can change."""

import io
import json
import shutil

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score

from coda_ray.config import Config, ConfigError
from coda_ray.jump.prepare import preparation_of
from coda_ray.pipeline import data
from coda_ray.pipeline.data import DataError
from coda_ray.pipeline.dry_run import survey
from coda_ray.pipeline.evaluate import evaluate, predictions_of
from coda_ray.pipeline.matrix import StagesFailedError, requests_of, run_transfers
from coda_ray.pipeline.methods.continued import adapt
from coda_ray.pipeline.request import Request
from coda_ray.pipeline.stage import with_needs
from coda_ray.pipeline.train_stages import pretrain, stage_tensors
from coda_ray.pipeline.transfer import plan, stages_of
from coda_ray.storage import open_place
from coda_ray.tiles.store import COMPOUND, LABEL, TileStore, table_bytes
from coda_ray.training.checkpoints import write_result
from synthetic import model_on, place, small_config, write_tiles

SCORES = ["n_images", "n_wells", "accuracy", "macro_f1", "well_accuracy", "well_macro_f1", "steps", "key"]


def world(root, **sections) -> Config:
    config = small_config(root, **sections)
    for source in ("a", "b"):
        write_tiles(config, source, batches=2, plates_per_batch=2)
    return config


def run(config, requests, lines=None):
    said = [] if lines is None else lines
    return run_transfers(config, requests, kind="adapt", name="test", command="test", say=said.append)


@pytest.fixture(scope="module")
def finished(ray_cluster, tmp_path_factory):
    config = world(tmp_path_factory.mktemp("transfers"))
    requests = [
        Request("a", "b", "coda", "batch", 0),
        Request("a", "b", "supervised", "source", 0),
        Request("a", "a", "dual-cb", "plate", 0),
    ]
    return config, requests, run(config, requests)


def test_every_unit_is_scored_before_and_after_on_itself_and_on_the_whole(finished):
    _, _, outcome = finished
    rows = outcome.transfers.set_index(["target", "method", "granularity", "unit", "scope"])
    expected = {("b", "dual-cb", "source", "b", "whole"), ("b", "supervised", "source", "b", "whole")}
    expected |= {("b", method, "batch", unit, "adapted") for method in ("dual-cb", "coda") for unit in ("b0", "b1")}
    expected |= {("b", "coda", "batch", unit, "whole") for unit in ("b0", "b1")}
    expected |= {("a", "dual-cb", "plate", "ab1p1", "adapted")}
    assert set(rows.index) == expected
    assert rows.loc[("b", "coda", "batch", "b0", "adapted"), "n_images"] == 24
    assert rows.loc[("b", "coda", "batch", "b0", "whole"), "n_images"] == 48
    assert rows.loc[("b", "coda", "batch", "b0", "whole"), "n_wells"] == 24
    assert set(outcome.transfers["steps"]) == {0, 4}


def test_one_unit_is_named_or_drawn_by_the_seed(finished):
    config, requests, _ = finished
    everything = {transfer.key for transfer in plan(config, requests[0])}

    def chosen(unit, seed=0):
        only = config.model_copy(update={"adapt": config.adapt.model_copy(update={"unit": unit})})
        return [t for t in plan(only, Request("a", "b", "coda", "batch", seed)) if t.identity["granularity"] == "batch"]

    named = chosen("b1")
    assert {(t.identity["unit"], t.identity["scope"]) for t in named} == {("b1", "adapted"), ("b1", "whole")}
    assert {t.key for t in named} < everything
    drawn = [{t.identity["unit"] for t in chosen("random", seed)} for seed in range(8)]
    assert drawn == [{t.identity["unit"] for t in chosen("random", seed)} for seed in range(8)]
    assert set.union(*drawn) == {"b0", "b1"}
    assert all(len(units) == 1 for units in drawn)
    with pytest.raises(DataError, match=r"adapt.unit = 'b9': b has no such batch; it has b0, b1"):
        chosen("b9")
    # The whole of a target has no units to choose from.
    only = config.model_copy(update={"adapt": config.adapt.model_copy(update={"unit": "b1"})})
    whole = Request("a", "b", "coda", "source", 0)
    assert [t.key for t in plan(only, whole)] == [t.key for t in plan(config, whole)]


def test_scores_are_those_of_the_stored_predictions(finished):
    config, requests, outcome = finished
    results = open_place(config.results)
    transfer = next(t for t in plan(config, requests[0]) if t.identity["scope"] == "adapted" and t.identity["method"] == "coda")
    table = pd.read_parquet(io.BytesIO(results.read(f"{transfer.evaluation.path}/predictions.parquet")))
    assert LABEL not in table
    index = data.load_tiles(config, "b").frame
    joined = table.merge(index[["Metadata_Plate", "Metadata_Well", "Metadata_Site", LABEL]])
    mine = joined[(joined["Metadata_Batch"] == transfer.identity["unit"]) & joined[LABEL].notna()]
    row = outcome.transfers[outcome.transfers["key"] == transfer.key].iloc[0]
    assert row["accuracy"] == pytest.approx(accuracy_score(mine[LABEL], mine["predicted"]))
    assert row["macro_f1"] == pytest.approx(
        f1_score(mine[LABEL], mine["predicted"], average="macro", labels=sorted(mine[LABEL].unique()))
    )
    probabilities = table.filter(like="probability_")
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    embeddings = pd.read_parquet(io.BytesIO(results.read(f"{transfer.evaluation.path}/embeddings.parquet")))
    assert embeddings.filter(like="feature_").shape == (len(index), 16)
    assert (embeddings["Metadata_Well"] == table["Metadata_Well"]).all()


def test_an_evaluation_goes_on_where_it_was_broken_off(finished):
    config, requests, _ = finished
    classifier = next(stage for stage in stages_of(plan(config, requests[1])) if stage.kind == "classify")
    tiles = data.load_tiles(config, "b").unit("plate", "bb0p1")
    small = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"minibatch": 8})})
    stage = evaluate(small, tiles, "one plate", classifier)
    folder = open_place(config.results).child(stage.path)
    told = np.eye(1, len(classifier.inputs["classes"]) + 16, dtype=np.float32).repeat(8, axis=0)
    folder.write("parts/8-001-000-000000.parquet", table_bytes(pa.table({"row": np.arange(8), "values": list(told)})))
    folder.write("parts/8-001-000-000001.parquet.0f.part", b"half a file")
    assert stage.run(small, None)["tiles"] == len(tiles)
    table = predictions_of(small, stage)
    certain = (table.filter(like="probability_").max(axis=1) == 1.0).to_numpy()
    np.testing.assert_array_equal(np.flatnonzero(certain), np.arange(8))


def test_a_second_run_only_looks_up(finished):
    config, requests, outcome = finished
    lines: list[str] = []
    again = run(config, requests, lines)
    assert lines == [f"{len(stages_of(t for r in requests for t in plan(config, r)))} stages, "
                     f"{len(stages_of(t for r in requests for t in plan(config, r)))} of them finished before"]  # fmt: skip
    pd.testing.assert_frame_equal(again.transfers, outcome.transfers)
    stored = pd.read_parquet(io.BytesIO(open_place(config.results).read("transfers.parquet")))
    assert stored.columns.tolist() == [
        "source", "target", "method", "granularity", "unit", "scope", "split", "seed", "n_images", "n_wells", "n_compounds",
        "accuracy", "macro_f1", "well_accuracy", "well_macro_f1", "compound_accuracy", "compound_macro_f1", "accuracy_low",
        "accuracy_high", "replicate_map_controls", "replicate_map", "moa_map", "ilisi", "kbet", "silhouette_batch", "steps",
        "seconds", "key",
    ]  # fmt: skip


def test_features_of_other_weights_do_not_meet_a_classifier_that_cannot_read_them(finished, tmp_path):
    """A pre-training that lies in the folder again, with other weights under the same key, as after a run on another machine."""
    config = finished[0]
    copied = config.model_copy(
        update={"results": place(tmp_path / "results"), "adapt": config.adapt.model_copy(update={"lr": 3e-4})}
    )
    shutil.copytree(config.results.address, copied.results.address)
    request = Request("a", "b", "coda", "source", 0)
    (pretrained,) = plan(copied, request)[-1].trained.needs
    folder = open_place(copied.results).child(pretrained.path)
    weights = {name: tensor + 1 for name, tensor in stage_tensors(copied, pretrained).items()}
    facts = {**folder.read_json("done.json"), **write_result(folder, "model.safetensors", weights)}
    folder.write("done.json", json.dumps(facts).encode())
    with pytest.raises(
        StagesFailedError, match=r"evaluate adapt coda .*: DamagedFileError: .*classify dual-cb on a.* was made of"
    ):
        run(copied, [request])


def test_labels_of_the_target_turned_to_noise_change_no_weight(finished, monkeypatch, tmp_path):
    config, requests, _ = finished
    before = [stage.key for stage in stages_of(plan(config, requests[0]))]
    true = data.load_tiles

    def noisy(config, source):
        index = true(config, source)
        if source != "b":
            return index
        rng = np.random.default_rng(0)
        return type(index)(index.frame.assign(**{LABEL: rng.permutation(index.frame[LABEL])}), index.folder, index.channels)

    monkeypatch.setattr(data, "load_tiles", noisy)
    noise = plan(config, requests[0])
    assert [stage.key for stage in stages_of(noise)] == before
    elsewhere = config.model_copy(update={"results": config.results.model_copy(update={"address": str(tmp_path)})})
    adapted = next(stage for stage in stages_of(plan(elsewhere, requests[0])) if stage.kind == "adapt")
    for stage in (*adapted.needs, adapted):
        stage.run(elsewhere, None)
    weights, again = stage_tensors(config, adapted), stage_tensors(elsewhere, adapted)
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert {t.key for t in noise}.isdisjoint({t.key for t in _with(monkeypatch, true, config, requests[0])})


def _with(monkeypatch, load, config, request):
    monkeypatch.setattr(data, "load_tiles", load)
    return plan(config, request)


def test_a_compound_without_partner_is_told_before_anything_runs(tmp_path):
    config = small_config(tmp_path)
    write_tiles(config, "a", batches=3)
    write_tiles(config, "b", batches=1)
    with pytest.raises(DataError, match=r"to b source b.*14 of 14 tiles have no partner.*7 compound\(s\).*no-partner same-image"):
        plan(config, Request("a", "b", "coda", "source", 0))
    alone = small_config(tmp_path, adapt={"no_partner": "same-image"})
    transfers = plan(alone, Request("a", "b", "coda", "source", 0))
    (told,) = {stage.note for stage in stages_of(transfers) if stage.note}
    assert told.endswith("each is its own partner")
    assert survey(alone, [Request("a", "b", "coda", "source", 0)]).warnings == (told,)
    assert plan(config, Request("a", "b", "oda", "source", 0))


@pytest.mark.parametrize(
    ("known", "told"),
    [
        ([], r"because of 28 no compound is known, which well and compound table give to jobs/ingest\.py; remedies"),
        (["DMSO", "c00"], r"because of 20 no compound is known, which"),
    ],
)
def test_tiles_of_unknown_compounds_are_told_as_such(tmp_path, known, told):
    config = small_config(tmp_path)
    write_tiles(config, "a", batches=3)
    store = write_tiles(config, "b", batches=2)
    for path in store.plates(["b"]):
        index = store.plate_index(path)
        store.write_plate_index(path, index.assign(**{COMPOUND: index[COMPOUND].where(index[COMPOUND].isin(known))}))
    with pytest.raises(DataError, match=told):
        plan(config, Request("a", "b", "coda", "source", 0))


def test_the_remedies_for_lonely_tiles_are_those_that_help(tmp_path):
    config = small_config(tmp_path)
    write_tiles(config, "a", batches=2)
    write_tiles(config, "b", batches=1, plates_per_batch=2)
    coda = Request("a", "b", "coda", "source", 0)

    def remedies(config, request=coda):
        with pytest.raises(DataError) as error:
            plan(config, request)
        return str(error.value).partition("remedies: ")[2]

    of_plates = "--adapt.dino.pairs plate (partners from other plates of the same batch)"
    same, oda = "--adapt.no-partner same-image (views of one image)", "or method oda"
    # The source has one batch left when its held-out plate is gone, and one plate.
    assert remedies(config) == f"{same}, {oda}"
    write_tiles(config, "a", batches=3)
    data.forget()
    assert remedies(config) == f"{same}, {of_plates}, {oda}"
    paired = small_config(tmp_path, adapt={"dino": {"pairs": "plate"}})
    adapted = plan(paired, coda)[-1].trained
    assert adapted.needs == plan(small_config(tmp_path, adapt={"no_partner": "same-image"}), coda)[-1].trained.needs
    unit = small_config(tmp_path, adapt={"partner_pool": "unit"})
    whole = "--adapt.partner-pool source (partners from the whole target)"
    assert remedies(unit, Request("a", "b", "coda", "plate", 0)) == f"{same}, {whole}, {oda}"


def test_partners_come_from_the_whole_target_or_the_unit(tmp_path):
    config = world(tmp_path)
    tiles = data.adaptation_tiles(config, "a", "b", "batch", "b0")
    source = tiles.source(seed=0, crop=32, pairs="batch")
    anchors, partners = source.plan.rows(np.arange(100))
    frame = tiles.pool.frame
    assert set(frame["Metadata_Batch"].iloc[anchors]) == {"b0"}
    assert set(frame["Metadata_Batch"].iloc[partners]) == {"b1"}
    inside = world(tmp_path / "unit", adapt={"partner_pool": "unit"})
    with pytest.raises(DataError, match="partner-pool source"):
        plan(inside, Request("a", "b", "coda", "batch", 0))


@pytest.mark.parametrize(
    ("method", "counted"),
    [
        ("coda", {"adapt": {"steps": "1 epochs"}}),
        ("coda", {"adapt": {"warmup": "1 epochs"}}),
        ("coda", {"dino": {"teacher_temperature_ramp": "1 epochs"}}),
        ("coda", {"dino": {"freeze_last_layer": "1 epochs"}}),
        ("tent", {"tent": {"steps": "1 epochs"}}),
        ("tent", {"tent": {"warmup": "1 epochs"}}),
    ],
)
def test_what_counts_epochs_depends_on_the_tiles_that_they_count(tmp_path, method, counted):
    """Also where the adaptation reads the tiles of one plate alone."""
    adapting = {"partner_pool": "unit", "no_partner": "same-image"}
    for sections, alike in ((counted, False), ({}, True)):
        fields = {**sections, "adapt": {**adapting, **sections.get("adapt", {})}}
        config = world(tmp_path / f"{alike}", **fields)
        names = data.load_tiles(config, "b").units("plate")
        fewer = config.model_copy(update={"adapt": config.adapt.model_copy(update={"plates": names[:2], "unit": names[0]})})
        all_known = config.model_copy(update={"adapt": config.adapt.model_copy(update={"unit": names[0]})})
        keys = {plan(c, Request("a", "b", method, "plate", 0))[-1].trained.key for c in (fewer, all_known)}
        assert (len(keys) == 1) is alike


def test_titles_tell_the_splits_apart(tmp_path):
    config = world(tmp_path)
    titles = [
        stage.title
        for split in ("plate", "compounds")
        for transfer in plan(config, Request("a", "b", "coda", "source", 0, split))
        for stage in with_needs([transfer.evaluation])
    ]
    assert len({title for title in titles if "compounds held out" in title}) == len(set(titles)) / 2


def test_unknown_units_plates_and_sources_are_told(tmp_path):
    config = world(tmp_path)
    with pytest.raises(DataError, match=r"b: no batch 'x' is known, but b0, b1; see adapt\.plates, adapt\.unit, learn_from"):
        data.adaptation_tiles(config, "a", "b", "batch", "x")
    wrong = world(tmp_path / "w", held_out={"a": "nope"})
    with pytest.raises(DataError, match=r"held_out\.a = 'nope': no such plate; a has ab0p0"):
        plan(wrong, Request("a", "b", "supervised", "source", 0))
    large = small_config(tmp_path, views={"tile_crop": 33})
    with pytest.raises(DataError, match=r"views\.tile_crop = 33: a has tiles of 32 px"):
        plan(large, Request("a", "b", "supervised", "source", 0))
    with pytest.raises(FileNotFoundError, match=r"no finished plate of 'c'"):
        plan(config, Request("a", "c", "supervised", "source", 0))


def test_a_stage_that_fails_leaves_the_others_finished(ray_cluster, tmp_path):
    config = world(tmp_path, dino={"collapse": "stop", "collapse_ceiling": 0.01, "collapse_patience": 1})
    requests = [Request("a", "b", "supervised", "source", 0), Request("a", "b", "oda", "source", 0)]
    with pytest.raises(StagesFailedError, match=r"CollapseError.*the teacher collapsed") as error:
        run(config, requests)
    assert "the same command again" in str(error.value)
    stored = pd.read_parquet(io.BytesIO(open_place(config.results).read("transfers.parquet")))
    assert stored["method"].tolist() == ["supervised"]


def test_the_matrix_lists_every_cell_once():
    matrix = {"sources": ["a", "b"], "targets": ["a", "b"], "methods": ["supervised", "coda"], "seeds": [0, 1]}
    cells = requests_of(Config.model_validate({"matrix": matrix}))
    assert len(cells) == len(set(cells)) == 2 * 2 * 2 + 2 * 2 * 2
    assert Request("a", "a", "dual-cb", "plate", 1) in cells


def test_an_empty_list_of_the_matrix_is_told():
    with pytest.raises(ConfigError, match=r"matrix\.targets is empty; name at least one"):
        requests_of(Config.model_validate({"matrix": {"sources": ["a"]}}))


def test_an_adaptation_that_knows_of_some_plates_is_that_of_a_target_that_has_no_others(tmp_path):
    config = world(tmp_path / "all")
    pretrained = pretrain(config, "a", objective="dino-cb", seed=0)
    names = [name for name in data.load_tiles(config, "b").units("plate") if name.endswith("p0")]
    adapting = {"granularity": "plate", "unit": names[0], "seed": 0}
    some = config.model_copy(update={"adapt": config.adapt.model_copy(update={"plates": names})})
    known = adapt(some, model_on(pretrained), "b", **adapting)
    assert known.key != adapt(config, model_on(pretrained), "b", **adapting).key

    few = small_config(tmp_path / "few")
    store, other = (TileStore.open(open_place(c.tiles), preparation_of(c)) for c in (config, few))
    for path in [*store.plates(["a"]), *(path for path in store.plates(["b"]) if path.endswith("p0"))]:
        for name in store.folder.names(path):
            other.folder.write(f"{path}/{name}", store.folder.read(f"{path}/{name}"))
    assert known.key == adapt(few, model_on(pretrain(few, "a", objective="dino-cb", seed=0)), "b", **adapting).key
    missing = config.model_copy(update={"adapt": config.adapt.model_copy(update={"plates": ["p9"]})})
    with pytest.raises(DataError, match=r"adapt.plates = 'p9': b has no such finished plate"):
        adapt(missing, model_on(pretrained), "b", **adapting)
