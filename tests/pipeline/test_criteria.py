"""Label-free criteria of a model: each against what one computes by hand, and without a look at a label."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from coda_ray.analysis.cka import MinibatchCka
from coda_ray.analysis.selection import CRITERIA, mean_entropy, mutual_information, rank_me
from coda_ray.config import Config
from coda_ray.draws import uniforms
from coda_ray.learn.views import dino_views, supervised_view
from coda_ray.pipeline import data, networks
from coda_ray.pipeline.criteria import SEED, anchors_of, criteria
from coda_ray.pipeline.evaluate import TILE_ID, embeddings_of, predictions_of
from coda_ray.pipeline.profile import profile
from coda_ray.pipeline.request import Request
from coda_ray.pipeline.train_stages import stage_tensors
from coda_ray.pipeline.transfer import plan, stages_of
from coda_ray.storage import open_place
from coda_ray.tiles.store import COMPOUND, LABEL
from synthetic import small_config, write_tiles

TILES = 20
METHODS = ("coda", "oda-mae")


@pytest.fixture(scope="module")
def config(ray_cluster, tmp_path_factory):
    config = small_config(tmp_path_factory.mktemp("criteria"), criteria={"tiles": TILES}, evaluate={"minibatch": 8})
    for source in ("a", "b"):
        write_tiles(config, source, plates_per_batch=2)
    return config


@pytest.fixture(scope="module")
def finished(config):
    """Facts of adapted models, and the stages behind them."""
    index, found = data.load_tiles(config, "b"), {}
    for method in METHODS:
        before, after = plan(config, Request("a", "b", method, "source", 0))
        stage = criteria(config, index, after.evaluation, [after.trained], before.evaluation)
        for one in (*stages_of([before, after]), stage.needs[0]):
            one.run(config, None)
        found[method] = (stage, stage.run(config, None), before, after)
    return found


def features(config, evaluation, index):
    """CLS tokens of some tiles."""
    return embeddings_of(config, evaluation).set_index(TILE_ID).loc[names(index)].filter(like="feature_").to_numpy()


def probabilities(config, evaluation, index):
    """Predictions of some tiles."""
    return predictions_of(config, evaluation).set_index(TILE_ID).loc[names(index)].filter(like="probability_").to_numpy()


def names(index):
    return list(index.frame[TILE_ID].itertuples(index=False, name=None))


@pytest.mark.parametrize("method", METHODS)
def test_criteria_are_those_of_predictions_and_features(config, finished, method):
    _, facts, before, after = finished[method]
    index, found = data.load_tiles(config, "b"), facts["criteria"]
    assert list(found) == list(CRITERIA)
    assert found["rank_me"] == pytest.approx(rank_me(features(config, after.evaluation, index)))
    assert found["mean_entropy"] == pytest.approx(mean_entropy(probabilities(config, after.evaluation, index)))
    assert found["mutual_information"] == pytest.approx(mutual_information(probabilities(config, after.evaluation, index)))
    cka, drawn = MinibatchCka(), data.drawn(index, TILES)
    cka.update(*[[features(config, transfer.evaluation, drawn)] for transfer in (before, after)])
    assert found["cka_to_source"] == pytest.approx(cka.matrix()[0, 0])
    # Four steps move the teacher little.
    assert found["cka_to_source"] < 1 - 1e-7


def test_profiles_are_measured_as_for_transfers_but_without_labels(config, finished):
    stage, facts, _, after = finished["coda"]
    index = data.load_tiles(config, "b")
    labelled = profile(config, index, after.evaluation).run(config, None)["scores"]
    assert labelled["moa_map"] is not None
    for name in ("replicate_map", "replicate_map_controls"):
        assert facts["criteria"][name] == labelled[name]
    unlabelled = stage.needs[0].facts(open_place(config.results))
    assert "moa_map" not in unlabelled["scores"]
    # 8 tiles of each compound: too few for a test of its batches.
    assert {name for name, value in facts["criteria"].items() if value is None} == {"ilisi", "kbet", "silhouette_batch"}
    assert "none of the 7 labels has 30 images" in facts["reasons"]["kbet"]


def test_held_out_loss_of_coda_is_that_of_pairs_in_new_views(config, finished):
    _, facts, _, after = finished["coda"]
    index = data.load_tiles(config, "b")
    sample = np.arange(TILES)
    source = data.unlabelled(index).source(seed=SEED, crop=32, pairs="batch")
    anchors, partners = (index.frame.iloc[rows] for rows in source.plan.rows(sample))
    assert anchors.index.is_unique
    assert (anchors[COMPOUND].to_numpy() == partners[COMPOUND].to_numpy()).all()
    assert (anchors["Metadata_Batch"].to_numpy() != partners["Metadata_Batch"].to_numpy()).all()
    learner = networks.dino_objective(config, channels=2, steps=1, steps_per_epoch=1, seed=0)
    learner.load_state_dict(stage_tensors(config, after.trained))
    assert learner.criterion.centre.any()
    read = source.read(sample)
    tile, partner = (torch.from_numpy(read[name]) for name in ("tile", "partner"))
    views = dino_views(tile, partner, seed=SEED, samples=sample, recipe=networks.recipe(config))
    with torch.no_grad():
        student, teacher = learner.student.eval()(*views)[0], learner.teacher(views[0])[0]
        expected = learner.criterion(student, teacher, config.dino.teacher_temperature)
    assert facts["criteria"]["held_out_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_one_network_has_alike_pairs_and_losses_at_every_granularity(config, finished):
    _, _, before, after = finished["coda"]
    index, results, units = data.load_tiles(config, "b"), open_place(config.results), []
    for unit in ("b0", "b1"):  # the weights of the whole target under the names of its batches
        inputs = {**after.trained.inputs, "granularity": "batch", "unit": unit}
        units.append(replace(after.trained, inputs=inputs))
        shutil.copytree(results.path(after.trained.path), results.path(units[-1].path))
        tiles = anchors_of(index, units[-1])
        anchors, partners = (
            index.frame.iloc[rows] for rows in tiles.source(seed=SEED, crop=32, pairs="batch").plan.rows(np.arange(28))
        )
        assert set(anchors["Metadata_Batch"]) == {unit}
        assert not set(partners["Metadata_Batch"]) & {unit}
        assert (anchors[COMPOUND].to_numpy() == partners[COMPOUND].to_numpy()).all()
    every = config.model_copy(update={"criteria": config.criteria.model_copy(update={"tiles": len(index)})})
    found = {}
    for learnt in ((after.trained,), tuple(units)):
        stage = criteria(every, index, after.evaluation, learnt, before.evaluation)
        found[len(learnt)] = stage.run(every, None)["criteria"]
    # Other partners and views of the same tiles; a tile paired with itself has a much lower loss.
    assert found[2].pop("held_out_loss") == pytest.approx(found[1].pop("held_out_loss"), rel=0.02)
    assert found[2] == found[1]


def test_held_out_loss_of_an_autoencoder_is_that_of_new_masks(config, finished):
    _, facts, _, after = finished["oda-mae"]
    source = data.unlabelled(data.load_tiles(config, "b")).source(seed=SEED, crop=32, pairs=None)
    network = networks.masked_autoencoder(config, channels=2)
    network.load_state_dict(stage_tensors(config, after.trained))
    sample = np.arange(TILES)
    tiles = torch.from_numpy(source.read(sample)["tile"])
    views = supervised_view(tiles, seed=SEED, samples=sample, recipe=networks.recipe(config))
    noise = torch.from_numpy(uniforms(SEED, sample, 9, 111)).float()
    with torch.no_grad():
        assert facts["criteria"]["held_out_loss"] == pytest.approx(network(views, noise).item(), rel=1e-5)


def test_noise_for_labels_and_other_minibatches_change_no_criterion(config, finished, tmp_path):
    stage, facts, before, after = finished["coda"]
    shutil.copytree(config.results.address, tmp_path, dirs_exist_ok=True)
    for kind in ("criteria", "profile"):
        shutil.rmtree(tmp_path / kind)
    elsewhere = Config.model_validate(
        {**config.model_dump(mode="json"), "results": {"address": str(tmp_path)}, "evaluate": {"minibatch": 5}}
    )
    index = data.load_tiles(config, "b")
    noise = np.random.default_rng(0).permutation(index.frame[LABEL].fillna("moa of DMSO"))
    noisy = type(index)(index.frame.assign(**{LABEL: noise}), index.folder, index.channels)
    assert noisy.fingerprint != index.fingerprint
    again = criteria(elsewhere, noisy, after.evaluation, [after.trained], before.evaluation)
    assert again.key == stage.key
    assert again.needs[0].key == stage.needs[0].key
    again.needs[0].run(elsewhere, None)
    found = again.run(elsewhere, None)
    loss = found["criteria"].pop("held_out_loss")
    assert loss == pytest.approx(facts["criteria"]["held_out_loss"], rel=1e-5)
    assert found["criteria"] == {name: facts["criteria"][name] for name in found["criteria"]}
    assert found["reasons"] == facts["reasons"]


def test_a_part_of_the_tiles_is_measured_by_itself(config, finished):
    _, _, before, after = finished["coda"]
    batch = data.load_tiles(config, "b").unit("batch", "b0")
    stage = criteria(config, batch, after.evaluation, [after.trained], before.evaluation)
    stage.needs[0].run(config, None)
    facts = stage.run(config, None)
    assert facts["tiles"] == 28
    assert facts["criteria"]["rank_me"] == pytest.approx(rank_me(features(config, after.evaluation, batch)))
    assert facts["criteria"]["replicate_map"] is None
    assert "two batches" in facts["reasons"]["replicate_map"]


def test_stages_below_and_settings_that_count(config, finished):
    stage, _, before, after = finished["coda"]
    index = data.load_tiles(config, "b")
    assert stage.needs[1:] == (after.evaluation, before.evaluation, after.trained)
    more = config.model_copy(update={"criteria": config.criteria.model_copy(update={"tiles": 21})})
    other = config.model_copy(update={"dino": config.dino.model_copy(update={"teacher_temperature": 0.05})})
    keys = {criteria(one, index, after.evaluation, [after.trained], before.evaluation).key for one in (config, more, other)}
    assert len(keys) == 3
    unadapted = criteria(config, index, before.evaluation, [], before.evaluation)
    assert unadapted.needs[-1] == before.evaluation.needs[0].needs[0]
    assert unadapted.needs[-1].kind == "pretrain"


@pytest.mark.parametrize("method", ["supervised", "tent", "ttt", "standardise"])
def test_what_has_no_self_supervised_networks_of_its_own_asks_for_none(config, method):
    transfers = plan(config, Request("a", "b", method, "source", 0))
    first, last = transfers[0], transfers[-1]
    stage = criteria(
        config, data.load_tiles(config, "b"), last.evaluation, [last.trained] if last.trained else [], first.evaluation
    )
    assert {need.kind for need in stage.needs} <= {"profile", "evaluate", "correct"}


def test_a_supervised_model_is_told_why_it_has_no_loss(config):
    (transfer,) = plan(config, Request("a", "b", "supervised", "source", 0))
    stage = criteria(config, data.load_tiles(config, "b"), transfer.evaluation, [], transfer.evaluation)
    for one in (*stages_of([transfer]), stage.needs[0]):
        one.run(config, None)
    facts = stage.run(config, None)
    assert facts["criteria"]["held_out_loss"] is None
    assert "no self-supervised loss" in facts["reasons"]["held_out_loss"]
    assert facts["criteria"]["cka_to_source"] == pytest.approx(1)


# Importing scib-metrics takes many seconds.
@pytest.mark.slow
def test_every_criterion_of_enough_tiles_is_a_number(config, tmp_path):
    copy = {"results": {"address": str(tmp_path)}, "tiles": {"address": str(tmp_path / "tiles")}}
    more = Config.model_validate({**config.model_dump(mode="json"), **copy})
    for source, plates in (("a", 2), ("b", 8)):
        write_tiles(more, source, plates_per_batch=plates)
    *_, transfer = plan(more, Request("a", "b", "dual-cb", "source", 0))
    stage = criteria(more, data.load_tiles(more, "b"), transfer.evaluation, [], transfer.evaluation)
    for one in (*stages_of([transfer]), stage.needs[0]):
        one.run(more, None)
    facts = stage.run(more, None)
    assert facts["reasons"] == {}
    assert all(np.isfinite(value) for value in facts["criteria"].values())
    assert facts["criteria"]["cka_to_source"] == pytest.approx(1)
