"""Sweeps on a real Ray: what is run, what is looked up, what fails, and what the table says."""

import json
import math
import os
import re
import shlex
import shutil
import signal
from pathlib import Path
from statistics import fmean

import numpy as np
import pandas as pd
import pytest
import ray
import yaml

from coda_ray.analysis.selection import CRITERIA
from coda_ray.config import Config, ConfigError, Range, Tracking, dump_config, parse_job
from coda_ray.pipeline import data, sweep
from coda_ray.pipeline.evaluate import TILE_ID, predictions_of
from coda_ray.pipeline.report import run_tune, trials_table
from coda_ray.pipeline.request import Request
from coda_ray.pipeline.space import config_at
from coda_ray.pipeline.stage import with_needs
from coda_ray.pipeline.sweep import SCORES, TABLE, _bases, _key, run_sweep
from coda_ray.pipeline.transfer import plan
from coda_ray.pipeline.trial import Trial
from coda_ray.storage import open_place
from coda_ray.tiles.store import LABEL
from coda_ray.tracking.records import read_records
from coda_ray.tracking.store import PARENT_TAG, RunStore
from jobs import adapt
from synthetic import small_config, write_tiles

pytestmark = pytest.mark.long
RATES = [1e-3, 1e-4, 1e-5, 2e-3, 1e30]
TUNE = {
    "pairs": [("a", "b")],
    "seeds": [0, 1],
    "space": {"granularity": ["source", "batch"], "adapt.lr": [1e-3]},
    "search": "grid",
    "objective": "mean_entropy",
    "score_every": 2,
}


def world(root, **tune) -> Config:
    config = small_config(root, tune={**TUNE, **tune}, criteria={"tiles": 16})
    for source in ("a", "b"):
        write_tiles(config, source, batches=2, plates_per_batch=2)
    return config


def swept(config, say=lambda line: None):
    said = []

    def told(line):
        said.append(line)
        say(line)

    outcome = run_sweep(config, "python jobs/tune.py", told)
    return outcome, said


def changed(config, **fields):
    return config.model_copy(update={"tune": config.tune.model_copy(update=fields)})


@pytest.fixture(scope="module")
def finished(ray_cluster, tmp_path_factory):
    """A grid of two points, each scored in the middle and at the end."""
    config = world(tmp_path_factory.mktemp("sweep"))
    return config, *swept(config)


def shared(config):
    """When each file was written that trials stand on: training on the source, and the models before adaptation."""
    stages = with_needs(cell.before for cell in _bases(config))
    files = (file for stage in stages for file in Path(open_place(config.results).path(stage.path)).rglob("*"))
    return {file: file.stat().st_mtime_ns for file in files if not file.name.startswith("oracles-")}


@pytest.fixture(scope="module")
def culled(finished):
    """A grid whose bad trials end early, and of which one fails: a learning rate of 1e30 diverges; told to MLflow."""
    config = changed(finished[0], space={"adapt.lr": RATES}, seeds=[0], stop_early=True, reduction=2.0, at_once=1)
    config = config.model_copy(update={"tracking": Tracking()})
    return config, *swept(config)


def test_every_trial_is_ranked_beside_the_unadapted_model(finished):
    _, outcome, said = finished
    assert outcome.table["status"].value_counts().to_dict() == {"finished": 2, "unadapted": 1}
    assert outcome.table["score"].is_monotonic_increasing
    assert outcome.whole
    assert "2 trials, 0 of them finished before" in said
    assert sum("finished at step 4, score" in line for line in said) == 2


def test_a_trial_that_raises_is_recorded_and_the_rest_finish(culled):
    _, outcome, _ = culled
    assert outcome.whole
    row = outcome.table.iloc[-1]
    assert (row["status"], row["adapt.lr"]) == ("failed", 1e30)
    assert "diverged" in row["reason"] or "FloatingPointError" in row["reason"]
    assert set(outcome.table["status"]) >= {"finished", "failed", "unadapted"}


@pytest.mark.parametrize("fields", [{"stop_early": True}, {"search": "optuna", "samples": 4}], ids=["asha", "optuna"])
def test_a_trial_without_a_score_fails_with_the_reason_and_the_rest_finish(finished, fields):
    space = {"adapt.lr": [1e-3, 6e-3]}
    config = changed(finished[0], space=space, seeds=[0], objective="mutual_information", at_once=1, **fields)
    (cell,) = Trial.at(config, "", {"adapt.lr": 6e-3}).cells
    facts = {"criteria": dict.fromkeys(CRITERIA), "reasons": {"mutual_information": "the model is an invented one"}}
    open_place(config.results).write(f"{cell.after(2)[1].path}/done.json", json.dumps(facts).encode())
    outcome, _ = swept(config)
    assert set(outcome.table["status"]) == {"finished", "failed", "unadapted"}
    (failed,) = outcome.table[outcome.table["status"] == "failed"].to_dict("records")
    assert failed["adapt.lr"] == 6e-3
    assert failed["reason"] == "ValueError: mutual_information cannot be measured on b: the model is an invented one"


def test_a_trial_whose_process_is_killed_is_recorded_and_the_rest_finish(finished, monkeypatch):
    rates, true = [5e-3, 7e-3, 8e-3], sweep._run_trial
    config = changed(finished[0], space={"adapt.lr": rates}, seeds=[0], score_every=0, at_once=1)

    def run(tuned, base, sweep):
        if tuned["point"]["adapt.lr"] == rates[1]:
            os.kill(os.getpid(), signal.SIGKILL)
        true(tuned, base, sweep)

    monkeypatch.setattr(sweep, "_run_trial", run)
    outcome, said = swept(config)
    assert outcome.whole
    statuses = outcome.table.dropna(subset="adapt.lr").set_index("adapt.lr")["status"].to_dict()
    assert statuses == {rates[0]: "finished", rates[1]: "failed", rates[2]: "finished"}
    (reason,) = outcome.table["reason"].dropna()
    assert reason.startswith("its process died; Ray's log says why")
    assert sum("failed: its process died" in line for line in said) == 1


def test_whatever_ends_the_search_the_table_is_written(finished, monkeypatch):
    config, outcome, _ = finished
    file = Path(next(file for file in outcome.files if file.endswith(TABLE)))
    before = file.read_bytes()
    file.unlink()

    def broken(*_args, **_options):
        raise RuntimeError("Tune broke down")

    monkeypatch.setattr(sweep, "_search", broken)
    with pytest.raises(RuntimeError, match="Tune broke down"):
        swept(config)
    assert file.read_bytes() == before


def test_bad_trials_end_early(culled):
    _, outcome, _ = culled
    stopped = outcome.table[outcome.table["status"] == "stopped"]
    assert set(stopped["step"]) == {2}
    assert stopped.index[0] > outcome.table.index[outcome.table["status"] == "finished"].max()


def test_mlflow_has_the_sweep_and_each_of_its_trials_below_it(culled):
    config, outcome, _ = culled
    store = RunStore.open(config.tracking, open_place(config.results))
    runs = store.client.search_runs([store.experiment_id])
    (job,) = (run for run in runs if run.data.tags.get("job") == "tune")
    trials = [run for run in runs if run.data.tags["kind"] == "trial"]
    assert {run.data.tags[PARENT_TAG] for run in trials} == {job.info.run_id}
    rows = outcome.table[outcome.table["status"] != "unadapted"]
    told = {run.data.params["adapt.lr"]: (run.data.tags["status"], run.data.metrics.get("score")) for run in trials}
    wanted = zip(rows["adapt.lr"], rows["status"], rows["score"], strict=True)
    assert told == {str(rate): (status, None if pd.isna(score) else score) for rate, status, score in wanted}
    best = outcome.table[outcome.table["status"] == "finished"].iloc[0]
    assert (job.info.status, job.data.metrics["best_score"]) == ("FINISHED", best["score"])
    sent = {file.path for file in store.client.list_artifacts(job.info.run_id, "report")}
    assert sent == {f"report/{Path(file).name}" for file in outcome.files}


def test_what_was_stopped_keeps_no_checkpoints(culled):
    config, outcome, _ = culled
    rates = set(outcome.table["adapt.lr"][outcome.table["status"] == "stopped"])
    cells = [cell for rate in rates for cell in Trial.at(config, "", {"adapt.lr": rate}).cells]
    wholes = [Path(config.results.address, cell._trained(unit, None).path) for cell in cells for unit in cell._units]
    assert len(wholes) == len(rates) > 0
    assert not [file for whole in wholes for file in whole.rglob("*") if file.is_file()]


def test_a_finished_adaptation_among_unfinished_ones_keeps_no_checkpoints_either(finished):
    config = changed(finished[0], space={"adapt.lr": [1e-3]}, seeds=[0, 2])
    done, missing = Trial.at(config, "", {"adapt.lr": 1e-3}).cells
    results = open_place(config.results)
    assert (done.finished(results), missing.finished(results)) == (True, False)
    outcome, _ = swept(config)
    assert outcome.whole
    wholes = [Path(config.results.address, cell._trained("b", None).path) for cell in (done, missing)]
    assert all((whole / "done.json").exists() and not (whole / "checkpoints").exists() for whole in wholes)


def test_the_same_command_again_runs_what_failed_alone(culled):
    config, outcome, _ = culled
    again, said = swept(config)
    assert "5 trials, 4 of them finished before" in said
    assert "before the trials:" not in said
    pd.testing.assert_frame_equal(again.table, outcome.table)


def test_stages_that_want_every_cpu_leave_trials_room_side_by_side(finished):
    config = changed(finished[0], space={"adapt.lr": [3e-3, 4e-3]}, seeds=[0], score_every=0, at_once=2)
    cpus = ray.cluster_resources()["CPU"]
    outcome, _ = swept(config.model_copy(update={"train": config.train.model_copy(update={"cpus_per_worker": cpus})}))
    assert outcome.table["status"].value_counts().to_dict() == {"finished": 2, "unadapted": 1}


def entropy_and_accuracy(config, seed):
    """Of the adapted model's stored predictions, computed one by one."""
    after = plan(config, Request("a", "b", "coda", "source", seed))[-1].evaluation
    table = pd.read_parquet(open_place(config.results).child(after.path).path("predictions.parquet"))
    probabilities = table.filter(like="probability_").to_numpy(float)
    entropies = [-sum(p * math.log(p) for p in row if p > 0) for row in probabilities]
    truth = table.merge(data.load_tiles(config, "b").frame[[*TILE_ID, LABEL]], on=TILE_ID).dropna(subset=LABEL)
    return fmean(entropies), (truth["predicted"] == truth[LABEL]).mean()


def test_a_score_is_what_one_computes_from_the_stored_predictions(finished):
    config, outcome, _ = finished
    table = outcome.table
    row = table[(table["status"] == "finished") & (table["granularity"] == "source")].iloc[0]
    (first, right), (second, rightly) = (entropy_and_accuracy(config_at(config, {"adapt.lr": 1e-3}), seed) for seed in (0, 1))
    assert row["score"] == pytest.approx((first + second) / 2, abs=1e-4)
    assert row["score_std"] == pytest.approx(abs(first - second) / 2**0.5, abs=1e-4)
    assert row["oracle_accuracy"] == pytest.approx((right + rightly) / 2)
    assert row["n_seeds"] == 2


def test_units_are_read_by_their_own_models(finished):
    config, _, _ = finished
    cell = Trial.at(config, "", {"granularity": "batch", "adapt.lr": 1e-3}).cells[0]
    evaluation, last = cell.after(None)
    joined = predictions_of(cell.config, evaluation).set_index(TILE_ID)
    assert len(joined) == len(cell.index)
    parts = [predictions_of(cell.config, stage).set_index(TILE_ID) for stage in evaluation.needs]
    assert [set(part.index.get_level_values("Metadata_Batch")) for part in parts] == [{"b0"}, {"b1"}]
    pd.testing.assert_frame_equal(joined.sort_index(), pd.concat(parts).sort_index())
    facts = last.facts(open_place(config.results))
    assert facts["criteria"]["held_out_loss"] > 0


def test_the_best_is_written_as_a_configuration(finished):
    _, outcome, _ = finished
    best = outcome.table[outcome.table["status"] == "finished"].iloc[0]
    file = next(address for address in outcome.files if address.endswith("best.yaml"))
    chosen = Config.model_validate(yaml.safe_load(Path(file).read_text()))
    assert (chosen.adapt.lr, chosen.tune.granularity) == (best["adapt.lr"], best["granularity"])
    assert list(pd.read_csv(next(f for f in outcome.files if f.endswith(TABLE)))["key"]) == list(outcome.table["key"])


def test_the_commands_of_the_best_run_as_they_are_printed_and_train_nothing(finished, tmp_path, monkeypatch, capsys):
    config, outcome, _ = finished
    file = tmp_path / "own.yaml"
    file.write_text(dump_config(config))
    assert run_tune(config, f"python jobs/tune.py --config {file} --tune.at-once 1") == 0
    commands = re.findall(r"^the best: (.+)$", capsys.readouterr().out, re.MULTILINE)
    best = outcome.table[outcome.table["status"] == "finished"].iloc[0]
    results, trained = Path(config.results.address), ("pretrain", "classify", "adapt")
    before = {path: path.stat().st_mtime_ns for kind in trained for path in results.glob(f"{kind}/**/*")}
    asked = []
    for command in commands:
        python, script, *words = shlex.split(command)
        assert (python, script) == ("python", "jobs/adapt.py")
        monkeypatch.setattr("sys.argv", [script, *words])
        assert adapt.main() == 0
        made = parse_job(adapt.AdaptJob, words, prog="", description="")
        asked.append((made.source, made.target, made.seed))
        assert (made.method, made.granularity, made.adapt.lr) == ("coda", best["granularity"], best["adapt.lr"])
    assert asked == [("a", "b", 0), ("a", "b", 1)]
    # The file alone is as good: neither method nor granularity has to be told.
    file = next(address for address in outcome.files if address.endswith("best.yaml"))
    monkeypatch.setattr("sys.argv", ["jobs/adapt.py", "--config", file, "--source", "a", "--target", "b", "--seed", "1"])
    assert adapt.main() == 0
    names = {job["name"] for job in read_records(open_place(config.results), "jobs")}
    assert f"coda a to b, per {best['granularity']}, seed 1" in names
    assert {path: path.stat().st_mtime_ns for kind in trained for path in results.glob(f"{kind}/**/*")} == before


def test_states_in_the_middle_leave_their_criteria_alone(finished):
    config, _, _ = finished
    results = open_place(config.results)
    cell = Trial.at(config, "", {"granularity": "source", "adapt.lr": 1e-3}).cells[0]
    evaluation, last = cell.after(2)
    assert last.facts(results)
    assert evaluation.facts(results) is None
    assert evaluation.needs[1].facts(results) is None
    trial = Trial.at(config, _key(config, _bases(config)), {"granularity": "source", "adapt.lr": 1e-3})
    curve = json.loads(results.read(trial.path))["curve"]
    assert [point["step"] for point in curve] == [2, 4]


def test_every_score_of_every_state_is_in_a_table(finished):
    config, outcome, _ = finished
    (file,) = [file for file in outcome.files if file.endswith("scores.csv")]
    scores = pd.read_csv(file)
    # Two trials at steps 2 and 4 and the unadapted model, each on every pair and seed.
    cells = len(config.tune.pairs) * len(config.tune.seeds)
    assert sorted(scores["step"]) == sorted([0, 2, 4, 2, 4] * cells)
    ends = scores[scores["step"] == 4].groupby("trial")[config.tune.objective].mean()
    ranked = outcome.table.set_index("key")["score"]
    assert ends.to_dict() == pytest.approx(ranked[ends.index].to_dict())


def test_no_label_of_the_target_is_behind_a_score(finished, monkeypatch):
    config, _, _ = finished
    true = data.load_tiles

    def planned():
        (cell, _) = Trial.at(config, "", {"granularity": "batch", "adapt.lr": 1e-3}).cells
        return [stage.key for stage in with_needs([cell.after(2)[1], cell.after(None)[1]])]

    def noisy(config, source):
        index = true(config, source)
        if source == "a":
            return index
        labels = np.random.default_rng(0).permutation(index.frame[LABEL])
        return type(index)(index.frame.assign(**{LABEL: labels}), index.folder, index.channels)

    before = planned()
    monkeypatch.setattr(data, "load_tiles", noisy)
    assert planned() == before


def test_other_labels_are_scored_anew_from_the_same_predictions(finished, monkeypatch):
    config, _, _ = finished
    point, true = {"granularity": "source", "adapt.lr": 1e-3}, data.load_tiles
    key, (cell, _) = _key(config, _bases(config)), Trial.at(config, "", point).cells
    known = cell.measure(None)

    def moved(config, source):
        index = true(config, source)
        names = sorted(index.frame[LABEL].dropna().unique())
        following = dict(zip(names, names[1:] + names[:1], strict=True))
        other = index.frame.assign(**{LABEL: index.frame[LABEL].map(following)})
        return index if source == "a" else type(index)(other, index.folder, index.channels)

    monkeypatch.setattr(data, "load_tiles", moved)
    (again, _) = Trial.at(config, "", point).cells
    evaluation, last = again.after(None)
    assert last.key == cell.after(None)[1].key
    found = again.measure(None)
    table = predictions_of(config, evaluation).merge(moved(config, "b").frame[[*TILE_ID, LABEL]], on=TILE_ID).dropna(subset=LABEL)
    assert found["oracle_accuracy"] == pytest.approx((table["predicted"] == table[LABEL]).mean())
    assert {name: found[name] for name in CRITERIA} == {name: known[name] for name in CRITERIA}
    assert _key(config, _bases(config)) != key
    monkeypatch.undo()
    assert cell.measure(None) == known


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"space": {}}, "tune.space is empty"),
        ({"pairs": []}, "tune.pairs is empty"),
        ({"stop_early": True, "score_every": 5}, r"tune\.score_every = 5: the longest adaptation has 4 steps"),
        ({"stop_early": True, "score_every": 4}, r"tune\.score_every = 4: the longest adaptation has 4 steps"),
        ({"space": {"adapt.minibatch": [8, 1], "adapt.dino.koleo_weight": [0.0, 0.1]}}, r"adapt\.minibatch = 1: .*koleo_weight"),
        ({"objective": "accuracy"}, "tune.objective = 'accuracy': choose from .*oracle_accuracy"),
        ({"objective": "kbet"}, r"tune\.objective: kbet cannot be measured on b: .*; choose another"),
        ({"space": {"adapt.speed": [1]}}, r"tune\.space\.adapt\.speed: there is no such field"),
    ],
)
def test_a_sweep_that_cannot_be_is_told_before_the_trials(finished, fields, told):
    config, _, _ = finished
    with pytest.raises(ConfigError, match=told):
        swept(changed(config, **fields))


def test_trials_that_fit_no_node_are_told_and_not_waited_for(finished, monkeypatch):
    """What they stand on is finished, so no other stage has asked before."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = changed(finished[0], space={"adapt.lr": [3e-3]})
    config = config.model_copy(update={"train": config.train.model_copy(update={"cpus_per_worker": 99.0})})
    with pytest.raises(ConfigError, match=r"train\.cpus_per_worker = 99: no node of this cluster has so much"):
        swept(config)


def test_what_trials_stand_on_is_made_once_and_never_by_a_trial(finished, tmp_path):
    config, before = world(tmp_path, seeds=[0], score_every=0), {}
    config = config.model_copy(update={"tracking": Tracking()})
    shutil.copytree(Path(finished[0].results.address) / "pretrain", Path(config.results.address) / "pretrain")

    def look(line):
        if line == "2 trials, 0 of them finished before":
            before.update(shared(config))

    outcome, _ = swept(config, look)
    assert list(outcome.table["status"]).count("finished") == 2
    assert {file.name for file in before} >= {"done.json", "predictions.parquet"}
    assert any(re.fullmatch(r"model-[0-9a-f]{8}\.safetensors", file.name) for file in before)
    assert shared(config) == before
    # MLflow got the curve of what was trained before the trials, below the sweep.
    store = RunStore.open(config.tracking, open_place(config.results))
    runs = store.client.search_runs([store.experiment_id])
    (job,) = (run for run in runs if run.data.tags.get("job") == "tune")
    (classifier,) = (run for run in runs if run.info.run_name == "classify dual-cb on a, seed 0")
    assert classifier.data.tags[PARENT_TAG] == job.info.run_id
    assert [point.step for point in store.client.get_metric_history(classifier.info.run_id, "loss")] == [1, 2, 3, 4]


def test_points_drawn_at_random_are_scored_on_every_pair(finished):
    config, _, _ = finished
    space, pairs = {"adapt.lr": Range(low=1e-4, high=1e-2, log=True)}, [("a", "b"), ("b", "a")]
    config = changed(config, pairs=pairs, seeds=[0], search="random", space=space, samples=2, score_every=0)
    outcome, _ = swept(config)
    tried = outcome.table[outcome.table["status"] == "finished"]
    assert len(tried) == 2
    assert tried["adapt.lr"].between(1e-4, 1e-2).all()
    scores = pd.read_csv(next(file for file in outcome.files if file.endswith(SCORES)))
    assert set(zip(scores["source"], scores["target"], strict=True)) == set(pairs)
    for _, row in outcome.table.iterrows():
        cells = scores[(scores["trial"] == row["key"]) & (scores["step"] == row["step"])]
        assert len(cells) == 2
        assert row["score"] == pytest.approx(cells["mean_entropy"].mean())
    more, said = swept(changed(config, samples=3))
    assert "3 trials, 2 of them finished before" in said
    assert set(more.table["adapt.lr"]) > set(tried["adapt.lr"])


def test_points_with_the_same_stages_are_one_trial(finished):
    config, known, _ = finished
    outcome, said = swept(changed(config, space={"granularity": ["source"], "adapt.lr": [1e-3], "tent.lr": [0.1, 0.2]}))
    assert (
        "granularity source, adapt.lr 0.001, tent.lr 0.2: the same trial as granularity source, adapt.lr 0.001, tent.lr 0.1"
        in said
    )
    assert outcome.table["status"].value_counts().to_dict() == {"finished": 1, "unadapted": 1}
    assert set(outcome.table["key"]) <= set(known.table["key"])


def test_whole_numbers_stay_whole_in_the_tables(finished):
    config, known, _ = finished
    outcome, _ = swept(changed(config, space={"adapt.steps": [4], "adapt.lr": [1e-3]}))
    assert set(outcome.table["key"]) <= set(known.table["key"])
    file = next(file for file in outcome.files if file.endswith(TABLE))
    assert sorted(pd.read_csv(file, dtype="str")["adapt.steps"].dropna()) == ["4"]
    shown = trials_table(
        outcome.table, config.model_copy(update={"tune": config.tune.model_copy(update={"space": {"adapt.steps": []}})})
    )
    assert sorted(shown.columns[1].cells) == ["4", "–"]


def test_an_oracle_is_named_wherever_its_score_stands(finished):
    config, plain, _ = finished
    outcome, said = swept(changed(config, objective="oracle_accuracy"))
    file = next(file for file in outcome.files if file.endswith(TABLE))
    assert {"oracle_score", "oracle_score_std"} <= set(pd.read_csv(file))
    assert not {"score", "score_std"} & set(pd.read_csv(file))
    assert sum("finished at step 4, oracle_score" in line for line in said) == 2
    own, known = (one.table.set_index(["status", "granularity"])["oracle_accuracy"].sort_index() for one in (outcome, plain))
    pd.testing.assert_series_equal(own, known)
    record = read_records(open_place(config.results), "jobs")
    assert {name for job in record if job["config"]["tune"]["objective"] == "oracle_accuracy" for name in job["scores"]} == {
        "best_oracle_score"
    }


@pytest.mark.parametrize(
    ("unit", "fields", "told"),
    [
        ("b1", {"objective": "replicate_map", "granularity": "batch"}, "'replicate_map' compares batches.* are of b1"),
        ("random", {"objective": "ilisi", "granularity": "batch"}, r"'ilisi' compares batches.*\(adapt\.unit = 'random'"),
        ("all", {"objective": "held_out_loss", "method": "tent"}, "'held_out_loss': tent has no self-supervised loss"),
        ("random", {"space": {"granularity": ["source", "batch"]}}, "would be scored on different tiles of b"),
    ],
)
def test_what_the_adapted_tiles_cannot_answer_is_told_before_anything_is_trained(tmp_path, unit, fields, told):
    config = world(tmp_path, **{"space": {"adapt.lr": [1e-3]}, **fields})
    with pytest.raises(ConfigError, match=told):
        swept(config.model_copy(update={"adapt": config.adapt.model_copy(update={"unit": unit})}))
    assert not Path(config.results.address).exists()


@pytest.mark.parametrize(
    ("space", "section", "field"),
    [
        ({"method": ["coda", "tent"]}, "tent", {"lr": 0.5}),
        ({"granularity": ["source", "batch"]}, "adapt", {"minibatch_unit": 4}),
    ],
)
def test_what_any_method_or_granularity_reads_is_in_the_key_of_the_sweep(finished, space, section, field):
    config = changed(finished[0], space=space)
    other = config.model_copy(update={section: getattr(config, section).model_copy(update=field)})
    assert _key(other, _bases(other)) != _key(config, _bases(config))
    narrow = changed(other, space={"adapt.lr": [1e-3]}), changed(config, space={"adapt.lr": [1e-3]})
    assert len({_key(one, _bases(one)) for one in narrow}) == 1


def test_a_trial_that_fails_keeps_the_scores_that_it_reached(tmp_path):
    config = world(tmp_path)
    trial, results = Trial.at(config, "", {"adapt.lr": 1e-3}), open_place(config.results)
    reached = {"step": 2, "seconds": 1.0, "cells": [{"seed": 0}], "curve": [{"step": 2, "score": 0.5}]}
    results.write(trial.path, json.dumps({"key": trial.key, "status": "running", "score": 0.5, **reached}).encode())
    record = trial.fail("it fell")
    assert json.loads(results.read(trial.path)) == record
    assert {name: record[name] for name in reached} == reached
    assert (record["status"], record["score"], record["reason"]) == ("failed", None, "it fell")


def test_optuna_goes_on_from_what_was_found(finished):
    config, _, _ = finished
    space = {"adapt.lr": Range(low=1e-4, high=1e-2, log=True)}
    config = changed(config, search="optuna", space=space, seeds=[0], samples=3, score_every=0)
    results = open_place(config.results)
    key = _key(config, _bases(config))
    for rate, score in ((2e-4, 0.5), (5e-4, 0.4)):
        trial = Trial.at(config, key, {"adapt.lr": rate})
        record = {**trial.fail(""), "status": "finished", "step": 4, "score": score, "cells": []}
        results.write(trial.path, json.dumps(record).encode())
    outcome, said = swept(config)
    assert "3 trials, 2 of them finished before" in said
    assert (outcome.table["status"] == "finished").sum() == 3
    (rate,) = set(outcome.table.dropna(subset="adapt.lr")["adapt.lr"]) - {2e-4, 5e-4}
    assert 1e-4 <= rate <= 1e-2
