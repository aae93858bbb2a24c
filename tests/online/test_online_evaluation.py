"""Online evaluations on small tiles: what is known when, what is scored, what it costs, and what a second run does."""

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.container import ErrorbarContainer
from mlflow import MlflowClient

from coda_ray.config import ConfigError
from coda_ray.jump.layout import PlateName
from coda_ray.jump.prepare import preparation_of
from coda_ray.online import evaluation
from coda_ray.online.evaluation import COLUMNS, SCORES, compare, plan_courses, plates_of, render_summary, summary_of
from coda_ray.pipeline import data
from coda_ray.pipeline.data import DataError
from coda_ray.pipeline.evaluate import predictions_of
from coda_ray.pipeline.matrix import StagesFailedError
from coda_ray.pipeline.request import Request
from coda_ray.pipeline.stage import Stage, with_needs
from coda_ray.pipeline.train_stages import lineage, pretrain
from coda_ray.pipeline.transfer import plan
from coda_ray.storage import open_place
from coda_ray.tiles.store import LABEL, TileStore
from coda_ray.tracking.records import course_history, read_records
from coda_ray.tracking.report_figures import PALETTE, online_figure
from coda_ray.tracking.store import RunStore
from coda_ray.tracking.sync import sync
from synthetic import small_config, write_tiles

PLATES = ["bb0p0", "bb0p1", "bb1p0", "bb1p1"]
ALL = ["none", "plate", "batch", "continue", "reuse"]


def settings(root, **sections):
    """A configuration of all strategies from a to b."""
    online = {"source": "a", "target": "b", **sections.pop("online", {})}
    return small_config(root, **{"adapt": {"no_partner": "same-image"}, **sections}, online=online)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Tiles of two sources."""
    config = settings(tmp_path_factory.mktemp("online"))
    for source in ("a", "b"):
        write_tiles(config, source, batches=2, plates_per_batch=2)
    return config


@pytest.fixture(scope="module")
def finished(ray_cluster, stored):
    """One seed of every strategy."""
    return stored, compare(stored, "python jobs/online.py", lambda line: None)


def by_strategy(config):
    return {course.strategy: course for course in plan_courses(config)}


def test_plates_arrive_by_batch_and_name(stored):
    assert plates_of(stored, "b") == [PlateName("b", name[1:3], name) for name in PLATES]


@pytest.mark.parametrize("arrived", [1, 2, 3])
def test_a_turn_is_the_same_where_later_plates_never_existed(stored, tmp_path, arrived):
    few = settings(tmp_path)
    store, other = (TileStore.open(open_place(config.tiles), preparation_of(config)) for config in (stored, few))
    kept = [path for path in store.plates(["b"]) if path.rpartition("/")[2] in PLATES[:arrived]]
    assert len(kept) == arrived
    for path in [*store.plates(["a"]), *kept]:
        for name in store.folder.names(path):
            other.folder.write(f"{path}/{name}", store.folder.read(f"{path}/{name}"))
    whole, part = by_strategy(stored), by_strategy(few)
    for strategy in ALL:
        # Without its last plate a batch is another one.
        told = arrived - arrived % 2 if strategy == "batch" else arrived
        for mine, theirs in zip(whole[strategy].steps[:told], part[strategy].steps[:told], strict=True):
            assert mine.answer.key == theirs.answer.key
            assert [stage.key for stage in mine.charged] == [stage.key for stage in theirs.charged]


def test_labels_of_the_target_turned_to_noise_change_no_stage(stored, monkeypatch):
    def stages():
        courses = plan_courses(stored)
        return [s.key for s in with_needs(step.answer.evaluation for course in courses for step in course.steps)]

    before, true = stages(), data.load_tiles

    def noisy(config, source):
        index = true(config, source)
        shuffled = np.random.default_rng(0).permutation(index.frame[LABEL])
        return type(index)(index.frame.assign(**{LABEL: shuffled}), index.folder, index.channels) if source == "b" else index

    monkeypatch.setattr(data, "load_tiles", noisy)
    assert stages() == before


def test_strategies_share_what_they_have_in_common(stored):
    courses = by_strategy(stored)
    first = {name: courses[name].steps[0].charged for name in ("plate", "continue", "reuse")}
    assert len({stages[0].key for stages in first.values()}) == 1
    chain = [step.charged[0] for step in courses["continue"].steps]
    pretrained = pretrain(stored, "a", objective="dino-cb", seed=0)
    assert [stage.key for stage in lineage(chain[-1])] == [pretrained.key, *[stage.key for stage in chain]]
    # The last plate knows of all plates, as in a matrix.
    (as_in_a_matrix,) = {
        t.trained.key
        for t in plan(stored, Request("a", "b", "coda", "plate", 0))
        if t.trained and t.identity["unit"] == PLATES[-1]
    }
    assert courses["plate"].steps[-1].charged[0].key == as_in_a_matrix
    (batch,) = {stage.key for step in courses["batch"].steps[2:] for stage in step.charged}
    assert batch in {t.trained.key for t in plan(stored, Request("a", "b", "coda", "batch", 0)) if t.trained}


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"online": {"source": None}}, r"online\.source is empty; give --online\.source"),
        ({"online": {"target": "a"}}, r"online\.target = 'a': it is the source too, or a lab of it; name another"),
        ({"online": {"strategies": []}}, r"online\.strategies is empty"),
        ({"online": {"seeds": []}}, r"online\.seeds is empty"),
        ({"adapt": {"plates": ["bb0p0"]}}, r"adapt\.plates = \['bb0p0'\]: the order of arrival says which plates are known"),
    ],
    ids=["source", "target", "strategies", "seeds", "plates"],
)
def test_what_is_not_whole_is_told(tmp_path, sections, told):
    with pytest.raises(ConfigError, match=told):
        plan_courses(settings(tmp_path, **sections))


def test_the_first_plate_has_no_partner_and_that_is_told_before_anything_runs(stored):
    strict = stored.model_copy(update={"adapt": stored.adapt.model_copy(update={"no_partner": "error"})})
    with pytest.raises(DataError, match=r"plate bb0p0.*14 of 14 tiles have no partner"):
        plan_courses(strict)


def test_a_target_without_labels_is_told(stored, monkeypatch):
    monkeypatch.setattr(data, "scored", lambda config, source, index, classes: index.where(np.zeros(len(index), bool)))
    with pytest.raises(DataError, match=r"online\.target = 'b': none of its tiles has a MoA label that a knows"):
        plan_courses(stored)


def test_a_plate_without_a_labelled_tile_has_costs_alone(stored, tmp_path, monkeypatch):
    def score(config, results, answers):
        scores = dict.fromkeys(SCORES, 0.5) | {"n_images": 12, "n_wells": 6}
        return [{**answer.identity, **scores} for answer in answers if answer.identity["turn"] != 2]

    monkeypatch.setattr(evaluation, "score", score)
    monkeypatch.setattr(evaluation, "run_stages", lambda config, stages, say, tracker: {})
    monkeypatch.setattr(Stage, "facts", lambda stage, results: {"steps": 4, "seconds": 2.0})
    config = settings(tmp_path, tiles={"address": stored.tiles.address}, online={"strategies": ["plate"], "seeds": [0, 1]})
    outcome = compare(config, "python jobs/online.py", lambda line: None)
    one = outcome.table[outcome.table["seed"] == 1]
    assert one["accuracy"].isna().tolist() == [False, True, False, False]
    assert one["n_images"].tolist() == [12, 0, 12, 12]
    assert one["seconds_so_far"].tolist() == [2, 4, 6, 8]
    assert outcome.summary[["accuracy_mean", "accuracy_std", "steps_mean", "n_seeds"]].to_numpy().tolist() == [[0.5, 0, 16, 2]]
    results = open_place(config.results)
    (job,) = results.names("online")
    records = read_records(results, f"online/{job}")
    assert [course_history(record)["plate_accuracy"].isna().sum() for record in records] == [1, 1]


def invented(strategy, seed, accuracy):
    scores = {"accuracy": accuracy, "macro_f1": accuracy, "well_accuracy": 1.0, "well_macro_f1": 1.0}
    return {"strategy": strategy, "seed": seed, "scores": {**scores, "waits": 0.5, "steps": 40, "seconds": 2.0 + seed}}


def test_the_summary_is_mean_and_deviation_over_seeds():
    records = [invented("plate", 0, 0.5), invented("none", 0, 0.25), invented("plate", 1, 0.7)]
    summary = summary_of(records).set_index("strategy")
    assert summary.index.tolist() == ["plate", "none"]
    assert summary.loc["plate", ["accuracy_mean", "accuracy_std", "n_seeds"]].tolist() == pytest.approx([0.6, 0.02**0.5, 2])
    assert np.isnan(summary.loc["none", "accuracy_std"])
    shown = render_summary(summary.reset_index(), "plates of b")
    assert shown.title == "plates of b: mean over plates, mean ± std over 2 seeds"
    assert render_summary(summary_of(records[:1]), "plates of b").title == "plates of b: mean over plates, 1 seed"
    assert list(shown.columns[1].cells) == ["60.0 ± 14.1", "25.0 ± –"]
    assert list(shown.columns[6].cells) == ["2 ± 1", "2"]


def test_the_figure_shows_every_turn_of_every_strategy():
    turns = [(1, "b0", "p0", 0.5, 3.0), (2, "b0", "p1", 0.7, 6.0), (3, "b1", "p2", 0.6, 9.0)]
    rows = [
        {
            **dict(zip(("turn", "batch", "plate", "accuracy", "seconds_so_far"), turn, strict=True)),
            "strategy": strategy,
            "seed": seed,
        }
        for strategy in ("none", "plate")
        for seed in (0, 1)
        for turn in turns
    ]
    figure = online_figure(pd.DataFrame(rows), "plates of b")
    accuracy, cost = figure.axes
    drawn = {panel: [c for c in panel.containers if isinstance(c, ErrorbarContainer)] for panel in (accuracy, cost)}
    assert [bars.get_label() for bars in drawn[accuracy]] == ["none", "plate"]
    for bars in drawn[accuracy]:
        np.testing.assert_allclose(bars[0].get_ydata(orig=False), [50, 70, 60])
    for bars in drawn[cost]:
        np.testing.assert_allclose(bars[0].get_ydata(orig=False), [3, 6, 9])
    assert len({bars[0].get_marker() for bars in drawn[cost]}) == 2
    assert {bars[0].get_color() for bars in drawn[cost]} <= set(PALETTE)
    assert [tick.get_text() for tick in accuracy.get_xticklabels()] == ["p0", "p1", "p2"]
    parted = [line for line in accuracy.lines if line.get_linestyle() == ":"]
    assert [line.get_xdata()[0] for line in parted] == [2.5]


@pytest.mark.long
def test_every_turn_is_scored_on_what_its_model_predicted(finished):
    config, outcome = finished
    assert outcome.table.columns.tolist() == list(COLUMNS)
    assert outcome.table.groupby("strategy", sort=False)["plate"].agg(list).to_dict() == dict.fromkeys(ALL, PLATES)
    labels = data.load_tiles(config, "b").frame
    for course in plan_courses(config):
        for step in course.steps:
            told = predictions_of(config, step.answer.evaluation)
            both = told.merge(labels[["Metadata_Plate", "Metadata_Well", "Metadata_Site", LABEL]]).dropna(subset=[LABEL])
            assert set(both["Metadata_Plate"]) == {step.turn.plate.plate}
            of_turn = (outcome.table["strategy"] == course.strategy) & (outcome.table["turn"] == step.turn.number)
            (row,) = outcome.table[of_turn].to_dict("records")
            assert row["accuracy"] == pytest.approx((both["predicted"] == both[LABEL]).mean())
            assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
            assert (row["n_images"], row["n_wells"]) == (12, 6)


@pytest.mark.long
def test_costs_are_those_that_the_stages_noted(finished):
    config, outcome = finished
    steps = outcome.table.groupby("strategy", sort=False)["steps"].agg(list).to_dict()
    assert steps == {
        "none": [0, 0, 0, 0], "plate": [4, 4, 4, 4], "batch": [0, 4, 0, 4], "continue": [4, 4, 4, 4], "reuse": [4, 0, 0, 0],
    }  # fmt: skip
    results = open_place(config.results)
    for course in plan_courses(config):
        mine = outcome.table[outcome.table["strategy"] == course.strategy]
        noted = [sum(stage.facts(results)["seconds"] for stage in step.charged) for step in course.steps]
        assert mine["seconds"].tolist() == pytest.approx(noted)
        assert mine["seconds_so_far"].tolist() == pytest.approx(np.cumsum(noted))
    assert outcome.table.set_index("strategy").loc["batch", "waits"].tolist() == [1, 0, 1, 0]


@pytest.mark.long
def test_the_tables_are_kept_and_the_job_is_whole(finished):
    config, outcome = finished
    results = open_place(config.results)
    (job,) = [json.loads(results.read(f"jobs/{name}")) for name in results.names("jobs")]
    assert job["whole"]
    assert "| none | " in job["summary"]
    assert job["scores"].keys() == {f"accuracy_{name}" for name in ALL}
    files = {Path(address).name: Path(address).read_bytes() for address in outcome.files}
    assert files.keys() == {"online.csv", "online.parquet", "summary.csv", "online.png"}
    pd.testing.assert_frame_equal(pd.read_csv(io.BytesIO(files["online.csv"])), outcome.table)
    pd.testing.assert_frame_equal(pd.read_parquet(io.BytesIO(files["online.parquet"])), outcome.table)


def runs_of(config):
    """Runs in MLflow, by kind."""
    client = MlflowClient(f"sqlite:///{config.results.address}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "coda_ray"]
    found: dict[str, list] = {}
    for run in client.search_runs([experiment.experiment_id]):
        found.setdefault(run.data.tags["kind"], []).append(run)
    return client, found


@pytest.mark.long
def test_a_second_run_does_what_is_missing_and_finds_the_same(finished):
    config, outcome = finished
    results, courses = open_place(config.results), by_strategy(config)
    for name in results.names("online"):
        results.delete(f"online/{name}")
    lost = courses["continue"].steps[-1]
    for stage in (*lost.charged, lost.answer.evaluation):
        results.delete(stage.path)
    said: list[str] = []
    again = compare(config, "python jobs/online.py", said.append)
    assert said == [
        "29 stages, 27 of them finished before",
        f"[28/29] {lost.charged[0].title}",
        f"[29/29] {lost.answer.evaluation.title}",
    ]
    columns = [name for name in COLUMNS if not name.startswith("seconds")]
    pd.testing.assert_frame_equal(again.table[columns], outcome.table[columns])


@pytest.mark.long
def test_a_stage_that_fails_is_told_and_the_job_is_not_whole(finished, tmp_path):
    config, _ = finished
    broken = settings(
        tmp_path,
        tiles={"address": config.tiles.address},
        dino={"collapse": "stop", "collapse_ceiling": 0.01, "collapse_patience": 1},
        online={"strategies": ["reuse"]},
    )
    with pytest.raises(StagesFailedError, match=r"(?s)CollapseError.*the same command again runs what is missing"):
        compare(broken, "python jobs/online.py", lambda line: None)
    results = open_place(broken.results)
    (job,) = [json.loads(results.read(f"jobs/{name}")) for name in results.names("jobs")]
    assert not job["whole"]


@pytest.mark.long
def test_mlflow_has_a_run_per_course_with_its_curves_and_one_per_stage(finished):
    config, _ = finished
    tracking = config.tracking.model_copy(update={"enabled": True, "system_metrics": False})
    tracked = config.model_copy(update={"tracking": tracking})
    outcome = compare(tracked, "python jobs/online.py", lambda line: None)
    client, runs = runs_of(config)
    (job,) = runs["job"]
    assert (len(runs["stage"]), len(runs["course"])) == (2 + 9, 5)
    assert all(run.info.status == "FINISHED" for kind in runs.values() for run in kind)
    for run in runs["course"]:
        assert run.data.tags["mlflow.parentRunId"] == job.info.run_id
        mine = outcome.table[outcome.table["strategy"] == run.data.params["strategy"]]
        curve = client.get_metric_history(run.info.run_id, "plate_accuracy")
        assert [point.step for point in curve] == [1, 2, 3, 4]
        assert [point.value for point in curve] == pytest.approx(mine["accuracy"].tolist())
        assert run.data.metrics["accuracy"] == pytest.approx(mine["accuracy"].mean())
        assert run.data.metrics["seconds_so_far"] == pytest.approx(mine["seconds"].sum())
    assert {file.path for file in client.list_artifacts(job.info.run_id, "report")} >= {"report/online.png", "report/online.csv"}
    before = sorted(run.info.run_id for kind in runs.values() for run in kind)
    results = open_place(config.results)
    assert sync(results, RunStore.open(tracked.tracking, results)).courses == 5
    assert sorted(run.info.run_id for kind in runs_of(config)[1].values() for run in kind) == before
