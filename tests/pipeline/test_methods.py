"""Every method of the matrix on a small tile store: what it makes, from what, and what it must never touch."""

import io
import re
import shutil
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

from coda_ray.analysis.corrections import LinearProbe
from coda_ray.analysis.retrieval import replicate_map
from coda_ray.config import Config, ConfigError
from coda_ray.learn.moments import align
from coda_ray.learn.ttt import TttRecipe, adapt_each
from coda_ray.learn.views import evaluation_view
from coda_ray.learn.vit import tokens
from coda_ray.methods import ADAPTING, NAMES, PER_UNIT, ROWS, TRAINED, row_of
from coda_ray.pipeline import data, networks
from coda_ray.pipeline.dry_run import survey
from coda_ray.pipeline.evaluate import embeddings_of, predictions_of
from coda_ray.pipeline.imported import import_model
from coda_ray.pipeline.matrix import run_transfers
from coda_ray.pipeline.methods import corrections
from coda_ray.pipeline.methods.shot import terms_of
from coda_ray.pipeline.models import choose, export_of, stored_models
from coda_ray.pipeline.moments import moments_of_all, moments_of_tiles
from coda_ray.pipeline.request import Request
from coda_ray.pipeline.task import run_missing
from coda_ray.pipeline.train_stages import load_model, stage_tensors
from coda_ray.pipeline.transfer import plan, score, stages_of, unadapted
from coda_ray.storage import open_place
from coda_ray.tiles.store import COMPOUND, LABEL, read_tiles
from coda_ray.tracking.records import transfers_frame
from jobs.adapt import AdaptJob
from synthetic import place, small_config, write_tiles

ROOT = Path(__file__).resolve().parents[2]
METHODS = NAMES
# Methods that can leave compounds out of all that they fit.
HOLDING_OUT = [row.name for row in ROWS if row.holds_out]


def world(root: Path, **sections: object) -> Config:
    config = small_config(root, **sections)
    for source in ("a", "b"):
        write_tiles(config, source, batches=2, plates_per_batch=2)
    return config


def run(config, requests):
    return run_transfers(config, requests, kind="adapt", name="test", command="test", say=lambda line: None)


@pytest.fixture(scope="module")
def finished(ray_cluster, tmp_path_factory):
    config = world(tmp_path_factory.mktemp("methods"))
    requests = [Request("a", "b", method, "source", 0) for method in METHODS]
    requests += [Request("a", "b", method, "batch", 0) for method in ("sphering", "coral", "harmony", "tent", "oda-mae")]
    return config, run(config, requests)


def planned(config, method, granularity="source"):
    return plan(config, Request("a", "b", method, granularity, 0))


def test_every_method_has_its_row_beside_the_model_it_starts_from(finished):
    config, outcome = finished
    rows = outcome.transfers
    whole = rows[(rows["granularity"] == "source") & (rows["scope"] == "whole")]
    assert set(whole["method"]) == set(METHODS)
    assert whole["accuracy"].between(0, 1).all()
    assert (whole["accuracy_low"] <= whole["accuracy"]).all()
    assert (whole["accuracy"] <= whole["accuracy_high"]).all()
    assert {unadapted(config, method) for method in METHODS} == {"supervised", "dual-mae", "dual-dino", "dual-cb"}
    trained = whole.set_index("method")["steps"]
    assert (trained[list(ADAPTING)] == 4).all()
    assert trained["tent"] == 2
    assert not trained.drop(list(TRAINED)).any()


def test_units_are_scored_on_themselves_and_on_the_whole_where_a_method_can(finished):
    _, outcome = finished
    rows = outcome.transfers[outcome.transfers["granularity"] == "batch"]
    found = {(method, scope) for method, scope in zip(rows["method"], rows["scope"], strict=True)}
    assert {(m, "adapted") for m in ("sphering", "coral", "harmony", "tent", "oda-mae", "dual-cb", "dual-mae")} <= found
    assert {(m, "whole") for m in ("sphering", "coral", "tent", "oda-mae")} <= found
    assert ("harmony", "whole") not in found
    assert (rows.loc[rows["scope"] == "adapted", "n_images"] == 24).all()


def by_hand(method, how, known, wanted, inside):
    """Correct features step by step: one plate after the other, then one eigenvector after the other."""

    def dmso(frame):
        return (frame[COMPOUND] == "DMSO").to_numpy()

    def scaled(frame):
        rows, plates = frame.filter(like="feature_").to_numpy(np.float64, copy=True), frame["Metadata_Plate"].to_numpy()
        for plate in set(plates) if how.get("zscore", "none") != "none" else ():
            own = rows[(plates == plate) & (dmso(frame) | (how["zscore"] == "all"))]
            rows[plates == plate] = (rows[plates == plate] - own.mean(axis=0)) / own.std(axis=0)
        return rows

    def power(matrix, exponent):
        values, vectors = np.linalg.eigh(matrix)
        return sum(value**exponent * np.outer(vector, vector) for value, vector in zip(values, vectors.T, strict=True))

    def white(controls, rows, epsilon):
        covariance = np.cov(controls.T)
        return (rows - controls.mean(axis=0)) @ power(covariance + epsilon * np.eye(16) * np.trace(covariance) / 16, -0.5)

    ours, theirs = scaled(known), scaled(wanted)
    if method == "probe":
        return ours, theirs
    if method == "coral":
        theirs = (theirs - theirs[inside].mean(axis=0)) / theirs[inside].std(axis=0)
        ours = (ours - ours.mean(axis=0)) / ours.std(axis=0)
        own, target = (np.cov(rows.T) + np.eye(16) for rows in (ours, theirs[inside]))
        return ours @ power(own, -0.5) @ power(target, 0.5), theirs
    controls = ours[dmso(known)], theirs[dmso(wanted) & inside]
    if how["sphering"] == "joint":
        controls = [np.concatenate(controls)] * 2

    def both(epsilon):
        return [white(of, rows, epsilon) for of, rows in zip(controls, (ours, theirs), strict=True)]

    def retrieved(epsilon):
        rows = np.concatenate([both(epsilon)[0][~dmso(known)], both(epsilon)[1][inside & ~dmso(wanted)]])
        frame = pd.concat([known[~dmso(known)], wanted[inside & ~dmso(wanted)]]).filter(like="Metadata_")
        frame["Metadata_Batch"] = frame["Metadata_Source"] + frame["Metadata_Batch"]
        well = (frame["Metadata_Plate"] + frame["Metadata_Well"]).to_numpy()
        wells, meta = pd.DataFrame(rows).groupby(well).mean(), frame.groupby(well).first()
        return replicate_map(wells.to_numpy(), meta, against="compounds", seed=0)["map"]

    given = how["sphering_epsilon"]
    return both(max(corrections.EPSILONS, key=retrieved) if given == "auto" else given)


@pytest.mark.parametrize(
    ("method", "granularity", "how"),
    [
        ("probe", "source", {}),
        ("sphering", "source", {"zscore": "all", "sphering": "joint", "sphering_epsilon": "auto"}),
        ("sphering", "batch", {"zscore": "all", "sphering": "joint", "sphering_epsilon": "auto"}),
        ("sphering", "source", {"zscore": "dmso", "sphering": "apart", "sphering_epsilon": "auto"}),
        ("sphering", "source", {"zscore": "none", "sphering": "apart", "sphering_epsilon": 0.5}),
        ("coral", "source", {}),
        ("coral", "batch", {}),
    ],
)
def test_a_correction_is_what_one_does_by_hand(finished, method, granularity, how):
    plain, _ = finished
    config = plain.model_copy(update={"baselines": plain.baselines.model_copy(update=how)})
    stage = planned(config, method, granularity)[-1].evaluation
    stage = stage.needs[0] if stage.kind == "combine" else stage
    stage.run(config, None)
    source, target = stage.needs
    known, wanted = embeddings_of(config, source), embeddings_of(config, target)
    column, unit = stage.inputs["unit"]
    ours, theirs = by_hand(method, how, known, wanted, (wanted[column] == unit).to_numpy())
    index = data.training_tiles(config, "a")
    truth = known.merge(index.frame[["Metadata_Plate", "Metadata_Well", "Metadata_Site", LABEL]], how="left")[LABEL]
    classes = sorted(truth.dropna().unique())
    codes = pd.Categorical(truth, categories=classes).codes
    probe = LinearProbe.fit(ours[codes >= 0], codes[codes >= 0].astype(np.int64), len(classes))
    found = predictions_of(config, stage).filter(like="probability_").to_numpy()
    np.testing.assert_allclose(found, probe.probabilities(theirs), atol=2e-3)


def test_sphering_and_coral_are_fitted_to_no_compound_that_is_held_out(finished, tmp_path, monkeypatch):
    plain, _ = finished
    tables = [embeddings_of(plain, stage) for stage in planned(plain, "probe")[-1].evaluation.needs]
    settings = {"results": {"address": str(tmp_path)}, "split": "compounds"}
    config = Config.model_validate({**plain.model_dump(mode="json"), **settings})
    held = [table[COMPOUND].isin(data.held_out_compounds(config, "a")).to_numpy() for table in tables]
    known, features = tables[0][~held[0]], list(tables[1].filter(like="feature_"))
    noise = np.random.default_rng(0).normal(size=(held[1].sum(), len(features)))
    for method in ("sphering", "coral"):
        stage, found = plan(config, Request("a", "b", method, "source", 0, "compounds"))[-1].evaluation, []
        for wanted in (tables[1], tables[1].copy()):
            if found:
                wanted.loc[held[1], features] = noise.astype(np.float32)
            read = {stage.needs[0].key: known, stage.needs[1].key: wanted}
            monkeypatch.setattr(corrections, "embeddings_of", lambda config, of, read=read: read[of.key])
            shutil.rmtree(tmp_path / stage.path, ignore_errors=True)
            stage.run(config, None)
            found.append(predictions_of(config, stage).filter(like="probability_").to_numpy())
        np.testing.assert_array_equal(found[0][~held[1]], found[1][~held[1]])
        assert np.abs(found[0] - found[1])[held[1]].max() > 1e-3


def test_standardised_tokens_reach_the_frozen_classifier(finished):
    config, _ = finished
    stage = planned(config, "standardise")[-1].evaluation
    model = load_model(config, stage.needs[0], None, 2).eval()

    def seen(index):
        views = evaluation_view(torch.from_numpy(np.stack(read_tiles(index, np.arange(len(index)), 32))), 24)
        with torch.no_grad():
            return tokens(model.extractor, views), index.frame["Metadata_Plate"].to_numpy()

    def spread(part):
        return part.mean(dim=(0, 1)), part.std(dim=(0, 1), correction=0)

    source, _ = seen(data.training_tiles(config, "a"))
    target, plates = seen(data.load_tiles(config, "b"))
    moved = target.clone()
    for plate in set(plates):
        for kind in (slice(0, 1), slice(1, None)):
            inside = torch.from_numpy(plates == plate)
            (own_mean, own_std), (mean, std) = spread(target[inside, kind]), spread(source[:, kind])
            moved[inside, kind] = (target[inside, kind] - own_mean) / own_std * std + mean
    with torch.no_grad():
        expected = model.classify(moved).softmax(1).numpy()
        as_it_is = model.classify(target).softmax(1).numpy()
    found = predictions_of(config, stage).filter(like="probability_").to_numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(found - as_it_is).max() > 1e-3
    np.testing.assert_allclose(embeddings_of(config, stage).filter(like="feature_"), moved[:, 0], atol=1e-4)


def test_tokens_are_standardised_after_adaptation_by_the_moments_of_the_unadapted_extractor(finished):
    config, _ = finished
    after = config.model_copy(update={"adapt": config.adapt.model_copy(update={"standardise": "after"})})
    before, moved = planned(config, "coda")[-1], planned(after, "coda")[-1]
    assert moved.trained.key == before.trained.key
    classifier, adapted, of_source, of_target = moved.evaluation.needs
    assert (adapted.key, of_source.needs, of_target.needs) == (before.trained.key, (classifier,), (classifier, adapted))
    run_missing([of_source, of_target, moved.evaluation], after)
    wanted, own = moments_of_all(after, of_source), moments_of_tiles(after, of_target, data.load_tiles(after, "b"))
    model = load_model(after, classifier, adapted, 2).eval()
    index = data.load_tiles(after, "b")
    views = evaluation_view(torch.from_numpy(np.stack(read_tiles(index, np.arange(len(index)), 32))), 24)
    with torch.no_grad():
        expected = model.classify(align(model.features(views), own, wanted)).softmax(1).numpy()
    found = predictions_of(after, moved.evaluation).filter(like="probability_").to_numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(found - predictions_of(config, before.evaluation).filter(like="probability_").to_numpy()).max() > 1e-4


def test_of_a_source_free_method_the_chosen_network_reads_the_images(finished):
    config, _ = finished
    teacher = config.model_copy(update={"shot": config.shot.model_copy(update={"extractor": "teacher"})})
    one, other = planned(config, "coda-shot")[-1], planned(teacher, "coda-shot")[-1]
    assert one.trained.key == other.trained.key
    assert one.evaluation.key != other.evaluation.key
    tensors, found = stage_tensors(config, one.trained), {}
    for name, own in (("student", config), ("teacher", teacher)):
        found[name] = load_model(own, one.evaluation.needs[0], one.trained, 2).extractor.state_dict()
        assert all(torch.equal(value, tensors[f"{name}.{key}"]) for key, value in found[name].items())
    assert not all(torch.equal(value, found["teacher"][key]) for key, value in found["student"].items())


def test_an_exported_model_is_adapted_without_anything_of_its_source(finished, tmp_path):
    config, _ = finished
    results = open_place(config.results)
    stored = choose(stored_models(results), results, method="dual-cb", source="a", seed=0)
    assert export_of(config, stored).write(open_place(place(tmp_path / "model")))
    (store,) = Path(config.tiles.address).iterdir()
    shutil.copytree(store / "b", tmp_path / "tiles" / store.name / "b")
    places = {name: {"address": str(tmp_path / name)} for name in ("tiles", "results")}
    asked = {"exported": str(tmp_path / "model"), "target": "b", "method": "coda-shot", "granularity": "source"}
    elsewhere = AdaptJob.model_validate({**config.model_dump(mode="json"), **places, **asked})
    there, model = import_model(elsewhere, str(tmp_path / "model"), "coda-shot")
    there = there.model_copy(update={"shot": there.shot.model_copy(update={"prior": "source"})})
    request = Request("a", "b", "coda-shot", "source", 0)
    outcome = run_transfers(there, [request], kind="adapt", name="test", command="test", say=lambda line: None, model=model)
    assert set(outcome.transfers["method"]) == {"dual-cb", "coda-shot"}
    at_home = config.model_copy(update={"shot": there.shot})
    first, again = planned(at_home, "coda-shot")[-1], plan(there, request, model)[-1]
    run_missing([first.trained], at_home)
    ours, theirs = stage_tensors(at_home, first.trained), stage_tensors(there, again.trained)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in ours)
    with pytest.raises(ConfigError, match=r"method = 'oda': .* holds a dual-cb, .* give one of coda, moments, shot, coda-shot"):
        import_model(elsewhere, str(tmp_path / "model"), "oda")
    with pytest.raises(ConfigError, match=r"nothing: .*give a folder that jobs/export.py wrote"):
        import_model(elsewhere, str(tmp_path / "nothing"), "coda")


def test_weights_of_terms_and_the_prior_are_part_of_a_key_where_they_count(finished):
    config, _ = finished

    def key(method, **shot):
        own = config.model_copy(update={"shot": config.shot.model_copy(update=shot)})
        return planned(own, method)[-1].trained.key

    assert key("coda-shot") != key("coda-shot", entropy=0.5) != key("coda-shot", prior="source")
    assert key("moments") == key("moments", entropy=0.5, prior="source")
    assert key("moments") != key("moments", moments=0.5)
    assert len({key(method) for method in ("coda-shot", "shot", "moments")}) == 3


def test_a_method_whose_terms_all_have_weight_0_is_refused_before_anything_runs(tmp_path):
    config = small_config(tmp_path)
    config = config.model_copy(update={"shot": config.shot.model_copy(update={"moments": 0.0})})
    with pytest.raises(ConfigError, match="moments: shot: every term of the method has weight 0"):
        terms_of(config, row_of("moments"))
    assert terms_of(config, row_of("coda-shot")).entropy == 1


def test_a_plate_without_moments_cannot_be_standardised(finished):
    config, _ = finished
    *_, of_target = planned(config, "standardise")[-1].evaluation.needs
    with pytest.raises(data.DataError, match=r"moments of .*: no readable tile of plate b0/ab0p0"):
        moments_of_tiles(config, of_target, data.load_tiles(config, "a"))


def test_test_time_training_is_one_image_at_a_time(finished):
    config, _ = finished
    stage = planned(config, "ttt")[-1].evaluation
    classifier, autoencoder = stage.needs
    index = data.load_tiles(config, "b")
    model = load_model(config, classifier, None, 2).eval()
    learner = networks.mae_objective(networks.unfilled(config), channels=2, seed=0)
    learner.warm_start(stage_tensors(config, autoencoder))
    rows = np.array([3, 17, 30])
    views = evaluation_view(torch.from_numpy(np.stack(read_tiles(index, rows, 32))), 24)
    alone = [
        adapt_each(
            learner.network,
            views[[i]],
            rows[[i]],
            seed=0,
            recipe=TttRecipe(**config.ttt.model_dump(exclude={"images_at_once"})),
            images_at_once=1,
            readout=lambda encoder, view: model.classify(tokens(encoder, view)).softmax(1),
        )
        for i in range(3)
    ]
    found = predictions_of(config, stage).filter(like="probability_").to_numpy()[rows]
    np.testing.assert_allclose(found, torch.cat(alone).numpy(), atol=1e-5)
    plain = predictions_of(config, planned(config, "dual-mae")[0].evaluation).filter(like="probability_").to_numpy()[rows]
    assert np.abs(found - plain).max() > 1e-6


def test_results_of_test_time_training_before_it_was_of_the_encoder_alone_are_those_of_the_whole(tmp_path):
    settings = {trains: world(tmp_path, ttt={"trains": trains}) for trains in ("encoder", "all")}
    inputs = {trains: planned(config, "ttt")[-1].evaluation.inputs["ttt"] for trains, config in settings.items()}
    assert inputs == {"encoder": {"steps": 2, "masks": 4, "trains": "encoder"}, "all": {"steps": 2, "masks": 4}}


def test_tent_moves_nothing_but_norms(finished):
    config, _ = finished
    trained = planned(config, "tent")[-1].trained
    before, after = stage_tensors(config, trained.needs[0]), stage_tensors(config, trained)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all("norm" in name for name in moved)
    assert any(name.startswith("model.extractor.") for name in moved)
    assert any(name.startswith("model.classifier.") for name in moved)


@pytest.mark.parametrize("method", ADAPTING)
def test_adaptation_leaves_classifier_and_projector_as_they_are(finished, method):
    config, _ = finished
    transfer = planned(config, method)[-1]
    classifier = transfer.evaluation.needs[0]
    before, after = (load_model(config, classifier, stage, 2).state_dict() for stage in (None, transfer.trained))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith("extractor.") for name in moved)


def noisy(load):
    """Load tiles, those of the target with labels that are noise."""

    def loaded(config, source):
        index = load(config, source)
        rng = np.random.default_rng(0)
        shuffled = {LABEL: rng.permutation(index.frame[LABEL])} if source == "b" else {}
        return type(index)(index.frame.assign(**shuffled), index.folder, index.channels)

    return loaded


@pytest.mark.parametrize("method", TRAINED)
def test_no_source_tile_and_no_label_of_the_target_is_read_while_adapting(finished, method, tmp_path, monkeypatch):
    config, _ = finished
    monkeypatch.setattr(data, "load_tiles", noisy(data.load_tiles))
    copies = {name: {"address": str(tmp_path / name)} for name in ("tiles", "results")}
    for name in copies:
        shutil.copytree(getattr(config, name).address, tmp_path / name)
    elsewhere = Config.model_validate({**config.model_dump(mode="json"), **copies})
    stage = planned(elsewhere, method)[-1].trained
    shards = [path for path in (tmp_path / "tiles").rglob("shard-*.npy") if "/a/" in path.as_posix()]
    assert shards
    for shard in shards:
        shard.unlink()
    shutil.rmtree(tmp_path / "results" / stage.path)
    assert stage.run(elsewhere, None)["replaced_tiles"] == 0
    again, first = stage_tensors(elsewhere, stage), stage_tensors(config, stage)
    assert all(torch.equal(again[name], first[name]) for name in first)


def test_noise_for_the_targets_labels_changes_no_stage_but_the_profiles(finished, monkeypatch):
    config, _ = finished
    requests = [Request("a", "b", m, "source", 0) for m in METHODS]
    requests += [Request("a", "b", m, "source", 0, "compounds") for m in HOLDING_OUT]
    requests += [Request("a", "b", m, "source", 0, "new-compounds") for m in METHODS]

    def keys():
        transfers = [transfer for request in requests for transfer in plan(config, request)]
        return {stage.key for stage in stages_of(transfers) if stage.kind != "profile"}, {t.key for t in transfers}

    stages, transfers = keys()
    monkeypatch.setattr(data, "load_tiles", noisy(data.load_tiles))
    with_noise, scored_otherwise = keys()
    assert with_noise == stages
    assert scored_otherwise.isdisjoint(transfers)


def test_profiles_are_the_means_of_wells(finished):
    plain, _ = finished
    config = plain.model_copy(update={"evaluate": plain.evaluate.model_copy(update={"profiles": True})})
    transfer = planned(config, "coda")[-1]
    results = open_place(config.results)
    transfer.profile.run(config, None)
    profiles = pd.read_parquet(io.BytesIO(results.read(f"{transfer.profile.path}/profiles.parquet")))
    images = embeddings_of(config, transfer.evaluation)
    assert len(profiles) == 4 * 7
    assert (profiles["Metadata_Image_Count"] == 2).all()
    assert "Metadata_Site" not in profiles
    one = profiles.iloc[5]
    mine = images[(images["Metadata_Plate"] == one["Metadata_Plate"]) & (images["Metadata_Well"] == one["Metadata_Well"])]
    features = [name for name in profiles if name.startswith("feature_")]
    np.testing.assert_allclose(one[features].to_numpy(float), mine[features].mean().to_numpy(), rtol=1e-5)
    (row,) = score(config, results, [transfer])
    assert -1 <= row["replicate_map"] <= 1
    assert -1 <= row["moa_map"] <= 1
    facts = transfer.profile.facts(results)
    assert "30 images" in facts["not_measured"]["ilisi"]
    assert row["ilisi"] is None


@pytest.mark.filterwarnings("ignore:The 'mode.copy_on_write' option is deprecated")
def test_profiles_are_read_by_pycytominer_and_anndata_as_the_docs_say(finished, tmp_path, monkeypatch):
    plain, _ = finished
    config = plain.model_copy(update={"evaluate": plain.evaluate.model_copy(update={"profiles": True})})
    stage = planned(config, "coda")[-1].profile
    stage.run(config, None)
    shutil.copy(Path(config.results.address, stage.path, "profiles.parquet"), tmp_path)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "results.md").read_text(), re.DOTALL)
    found: dict[str, object] = {}
    exec(code, found)  # noqa: S102
    wells = pd.read_parquet("profiles.parquet")
    features = [name for name in wells if name.startswith("feature_")]
    controls = wells.loc[wells["Metadata_Control"] == "negcon", features].to_numpy(np.float64)
    scaled = (wells[features] - controls.mean(0)) / controls.std(0)
    np.testing.assert_allclose(found["by_dmso"][features], scaled, rtol=1e-3, atol=1e-3)
    medians = scaled.groupby(wells[COMPOUND]).median()
    np.testing.assert_allclose(found["by_compound"].set_index(COMPOUND)[features], medians, rtol=1e-3, atol=1e-3)
    stored = anndata.read_h5ad("profiles.h5ad")
    np.testing.assert_array_equal(stored.X, wells[features].to_numpy())
    assert stored.obs["Metadata_Well"].tolist() == wells["Metadata_Well"].tolist()


def test_held_out_compounds_are_scored_and_nowhere_else(ray_cluster, tmp_path):
    config = world(tmp_path, split="compounds")
    held = data.held_out_compounds(config, "a")
    assert len(held) == 3
    assert len({name[1] for name in held}) == 3
    assert not set(held) & set(data.training_tiles(config, "a").frame[COMPOUND])
    assert not set(held) & set(data.labelled_held_out(config, "a").frame[COMPOUND])
    adapted = data.adaptation_tiles(config, "a", "b", "source", "b")
    assert not set(held) & set(adapted.pool.frame[COMPOUND])
    assert "DMSO" in set(adapted.pool.frame[COMPOUND])
    requests = [Request("a", "b", "coda", "source", 0, "compounds"), Request("a", "a", "dual-cb", "plate", 0, "compounds")]
    rows = run(config, requests).transfers
    assert set(rows["split"]) == {"compounds"}
    assert set(rows["n_compounds"]) == {3}
    assert rows.set_index(["target", "method"])["n_images"].to_dict() == {
        ("b", "dual-cb"): 24, ("b", "coda"): 24, ("a", "dual-cb"): 6,
    }  # fmt: skip
    keys = {stage.key for request in requests for stage in stages_of(plan(config, request))}
    of_plates = [replace(request, split="plate") for request in requests]
    assert keys.isdisjoint({stage.key for request in of_plates for stage in stages_of(plan(config, request))})


def test_held_out_compounds_of_the_target_are_in_nothing_that_is_fitted(finished, monkeypatch):
    config, _ = finished
    requests = [Request("a", "b", method, "source", 0, "compounds") for method in HOLDING_OUT]

    def fitted():
        stages = stages_of(transfer for request in requests for transfer in plan(config, request))
        return {stage.key for stage in stages if stage.kind in ("pretrain", "classify", "adapt", "moments")}

    before, true = fitted(), data.load_tiles
    held = data.held_out_compounds(config.model_copy(update={"split": "compounds"}), "a")

    def without(config, source):
        index = true(config, source)
        return index.where(~index.frame[COMPOUND].isin(held)) if source == "b" else index

    monkeypatch.setattr(data, "load_tiles", without)
    assert held
    assert fitted() == before


def test_harmony_cannot_hold_compounds_out(tmp_path):
    config = world(tmp_path)
    with pytest.raises(ConfigError, match=r"method harmony with split compounds.*leave the method out there"):
        plan(config, Request("a", "b", "harmony", "source", 0, "compounds"))


def test_features_of_held_out_compounds_are_measured_beside_the_controls_alone(tmp_path):
    config = world(tmp_path, split="compounds", evaluate={"profiles": True})
    index = data.unseen(config, "a", data.load_tiles(config, "b"))
    assert set(index.frame[COMPOUND]) == {*data.held_out_compounds(config, "a"), "DMSO"}
    whole = plan(config, Request("a", "b", "coda", "source", 0, "compounds"))[-1]
    assert whole.profile.inputs["tiles"] == index.fingerprint


def test_the_dry_run_counts_every_method_that_is_finished(finished):
    config, _ = finished
    found = survey(config, [Request("a", "b", method, "source", 0) for method in METHODS])
    assert found.stages["finished"].all()
    assert found.stages["gpu_hours"].notna().all()
    stages = stages_of(planned(config, "standardise"))
    moments = [stage for stage in stages if stage.kind == "moments"]
    told = found.stages.set_index("title")["bytes"]
    assert len(moments) == 2
    for stage in moments:
        facts = stage.facts(open_place(config.results))
        written = Path(config.results.address, stage.path, facts["file"]).stat().st_size
        assert 0 < written - told[stage.title] < 4096


def test_a_single_well_has_a_score_without_an_interval_and_nothing_that_was_read_has_none(finished):
    config, _ = finished
    whole = planned(config, "dual-cb")[0]
    results, frame = open_place(config.results), whole.index.frame
    one = whole.index.where((frame["Metadata_Plate"] == frame["Metadata_Plate"].iloc[0]) & (frame["Metadata_Well"] == "A00"))
    unread = type(one)(one.frame.assign(Metadata_Site="9"), one.folder, one.channels)
    (record,) = score(config, results, [replace(whole, index=unread), replace(whole, index=one)])
    assert (record["n_wells"], record["n_images"]) == (1, 2)
    assert 0 <= record["accuracy"] <= 1
    assert record["accuracy_low"] is None
    assert record["accuracy_high"] is None
    table = transfers_frame([record])
    assert table[["accuracy_low", "accuracy_high"]].isna().all(axis=None)


ABLATIONS = {
    "views": {"kind": "resized"},
    "dino": {"pairs": "plate", "extractor": "student", "drop_path": 0.4},
    "adapt": {"lr_end": 1e-3, "lr_start": 1e-3, "warmup": 0},
}


@pytest.mark.parametrize(("section", "field"), [(section, field) for section, fields in ABLATIONS.items() for field in fields])
def test_every_ablation_gives_other_predictions_a_key_of_their_own(tmp_path, section, field):
    plain = world(tmp_path)
    settings = plain.model_dump()
    settings[section][field] = ABLATIONS[section][field]
    other = Config.model_validate(settings)
    keys = [plan(config, Request("a", "b", "coda", "source", 0))[-1].evaluation.key for config in (plain, other)]
    assert keys[0] != keys[1]


def test_ablations_do_what_they_say(ray_cluster, tmp_path):
    config = world(tmp_path, **ABLATIONS)
    transfer = plan(config, Request("a", "b", "coda", "source", 0))[-1]
    trained, classifier = transfer.trained, transfer.evaluation.needs[0]
    for stage in stages_of([transfer]):
        if stage.kind in ("pretrain", "classify", "adapt"):
            stage.run(config, None)
    work = trained.make(open_place(config.results), None)[1].build()
    assert work.objective.recipe.kind == "resized"
    anchors, partners = work.source.plan.rows(np.arange(200))
    frame = data.adaptation_tiles(config, "a", "b", "source", "b").pool.frame
    plates, batches = (frame[f"Metadata_{name}"].to_numpy() for name in ("Plate", "Batch"))
    assert (plates[anchors] != plates[partners]).all()
    assert set(batches[anchors] == batches[partners]) == {True, False}
    dropped = [getattr(block.drop_path1, "drop_prob", 0.0) for block in work.objective.student.backbone.blocks]
    assert max(dropped) == pytest.approx(0.4)
    # The teacher has the same blocks, and never drops one.
    assert not any(module.training for module in work.objective.teacher.modules())
    history = pd.read_parquet(Path(config.results.address, trained.path, "history.parquet"))
    assert history["lr"].tolist() == [pytest.approx(1e-3)] * 4
    tensors, model = stage_tensors(config, trained), load_model(config, classifier, trained, 2)
    for name, value in model.extractor.state_dict().items():
        assert torch.equal(value, tensors[f"student.{name}"])
    assert any(not torch.equal(tensors[f"student.{name}"], tensors[f"teacher.{name}"]) for name in model.extractor.state_dict())


def test_a_stage_of_one_process_waits_for_no_gpu_and_no_group(finished, tmp_path):
    config, _ = finished
    settings = {**config.model_dump(mode="json"), "results": {"address": str(tmp_path / "results")}}
    shutil.copytree(config.results.address, tmp_path / "results")
    elsewhere = Config.model_validate({**settings, "train": {**settings["train"], "gpus_per_worker": 1, "workers": "2"}})
    stage = planned(elsewhere, "probe")[-1].evaluation
    shutil.rmtree(tmp_path / "results" / stage.path)
    # No node has a GPU: it would wait for ever.
    run_missing([stage], elsewhere)
    assert stage.facts(open_place(elsewhere.results))["tiles"] == 56


@pytest.mark.parametrize(
    ("how", "changed", "told"),
    [
        ({}, {"Metadata_Control": None}, r"no tile of it has Metadata_Control = negcon.*leave the method out"),
        ({"zscore": "dmso"}, {"Metadata_Control": None}, r"plate a/b0/ab0p0 has 0 images to take .*--baselines\.zscore all"),
        ({}, {COMPOUND: None}, r"no well holds a known compound.*; give --baselines\.sphering-epsilon a number"),
        ({"sphering_epsilon": 1.0}, {COMPOUND: None}, None),
    ],
)
def test_what_sphering_lacks_is_told(finished, tmp_path, monkeypatch, how, changed, told):
    plain, _ = finished
    settings = {**plain.model_dump(mode="json"), "results": {"address": str(tmp_path)}, "baselines": how}
    config = Config.model_validate(settings)
    stage = planned(config, "sphering")[-1].evaluation
    monkeypatch.setattr(corrections, "embeddings_of", lambda config, stage: embeddings_of(plain, stage).assign(**changed))
    if told is None:
        assert stage.run(config, None)["tiles"] == 56
        return
    with pytest.raises(ConfigError, match=told):
        stage.run(config, None)


def test_joint_sphering_makes_do_with_the_controls_of_one_lab(finished, tmp_path, monkeypatch):
    plain, _ = finished
    config = Config.model_validate({**plain.model_dump(mode="json"), "results": {"address": str(tmp_path)}})
    stage = planned(config, "sphering")[-1].evaluation

    def controls_of_the_target_alone(config, of):
        table = embeddings_of(plain, of)
        return table.assign(Metadata_Control=None) if of is stage.needs[0] else table

    monkeypatch.setattr(corrections, "embeddings_of", controls_of_the_target_alone)
    facts = stage.run(config, None)
    assert facts["epsilon"] in corrections.EPSILONS
    assert facts["replicate_map"][str(facts["epsilon"])] == max(facts["replicate_map"].values())


def test_methods_are_told_apart_by_whether_they_fit_a_unit():
    assert set(METHODS) >= PER_UNIT
    assert {"supervised", "dual-cb", "ttt", "standardise", "probe"}.isdisjoint(PER_UNIT)
