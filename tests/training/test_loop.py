"""The worker loop on real Ray: what is broken off continues, to the bit."""

import io
import json
import os
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
import torch
from ray import cloudpickle

from coda_ray.pipeline.methods.continued import adapt
from coda_ray.pipeline.tally import Tally
from coda_ray.pipeline.train_stages import classify, paused, pretrain, stage_tensors
from coda_ray.storage import open_place
from synthetic import model_on, small_config, write_tiles

# Workers of a Ray Train group do not find this module by name.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def history_of(config, stage):
    return pq.read_table(io.BytesIO(open_place(config.results).child(stage.path).read("history.parquet")))


def assert_same(a, b, tolerance=0.0):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


class Breaks:
    """A live report that breaks the run off once at a step; picklable, remembers on disk."""

    def __init__(self, marker: Path, step: int, how: str) -> None:
        self.marker, self.step, self.how = marker, step, how

    def __call__(self, step, time_ms, metrics):
        if step == self.step and not self.marker.exists():
            self.marker.touch()
            if self.how == "exit":
                os._exit(3)
            raise ConnectionError("broken off on purpose")


def configs(tmp_path, **sections):
    """Two configurations over the same tiles with results of their own."""
    first = small_config(tmp_path, **{"pretrain": {"steps": 7}, **sections})
    write_tiles(first, "s", batches=3)
    second = first.model_copy(update={"results": first.results.model_copy(update={"address": str(tmp_path / "again")})})
    return first, second


def test_a_run_that_was_broken_off_continues_to_the_bit(ray_cluster, tmp_path, capsys):
    first, second = configs(tmp_path)
    stage = pretrain(first, "s", objective="dino-cb", seed=0)
    stage.run(first, None)
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()[1:]] == [
        f"{stage.title}: step {step}/7" for step in range(1, 8)
    ]
    broken = pretrain(second, "s", objective="dino-cb", seed=0)
    assert broken.key == stage.key
    with pytest.raises(ConnectionError):
        broken.run(second, Breaks(tmp_path / "broke", 5, "raise"))
    assert broken.facts(open_place(second.results)) is None
    kept = open_place(second.results).names(f"{broken.path}/checkpoints")
    assert kept == ["step-00000002", "step-00000004"]
    capsys.readouterr()
    told = []
    broken.run(second, None, lambda done, total: told.append((done, total)))
    assert told == [(4, 7), (5, 7), (6, 7), (7, 7)]
    (line,) = capsys.readouterr().out.splitlines()  # who is told how far it is is not told twice
    assert "continues at step 4" in line
    assert_same(stage_tensors(first, stage), stage_tensors(second, broken))


def test_a_state_in_the_middle_is_that_of_the_whole_and_the_whole_goes_on_from_it(ray_cluster, tmp_path):
    first, second = configs(tmp_path, adapt={"steps": 7})
    write_tiles(first, "t", batches=2)

    def adapted(config, until):
        pretrained = pretrain(config, "s", objective="dino-cb", seed=0)
        pretrained.run(config, None)
        return adapt(config, model_on(pretrained), "t", granularity="source", unit="t", seed=0, until=until)

    whole, middle = adapted(first, None), adapted(first, 3)
    with pytest.raises(ConnectionError):
        whole.run(first, Breaks(tmp_path / "broke", 3, "raise"))
    assert middle.run(first, None)["steps"] == 3
    whole.run(first, None)
    straight, paused = adapted(second, None), adapted(second, 5)
    straight.run(second, None)
    assert_same(stage_tensors(first, whole), stage_tensors(second, straight))
    # The whole is there already: the state in the middle is made anew.
    assert paused.run(second, None)["steps"] == 5
    assert adapted(second, 3).run(second, None)["steps"] == 3
    assert_same(stage_tensors(first, middle), stage_tensors(second, adapted(second, 3)))
    assert len({stage.key for stage in (whole, middle, paused)}) == 3


def test_a_finished_stage_is_never_run_again(ray_cluster, tmp_path):
    config, _ = configs(tmp_path)
    stage = pretrain(config, "s", objective="dino", seed=1)
    facts = stage.run(config, None)
    assert stage.run(config, Breaks(tmp_path / "never", 1, "raise")) == facts
    assert not (tmp_path / "never").exists()


def test_seed_and_settings_name_the_stage(tmp_path):
    config, _ = configs(tmp_path)
    keys = {pretrain(config, "s", objective=o, seed=seed).key for o in ("dino", "dino-cb", "mae") for seed in (0, 1)}
    assert len(keys) == 6
    slower = small_config(tmp_path, pretrain={"steps": 7, "lr": 5e-4})
    assert pretrain(slower, "s", objective="dino-cb", seed=0).key not in keys
    elsewhere = small_config(tmp_path, pretrain={"steps": 7}, train={"workers": "2", "log_every": 3}, stream={"prefetch": 1})
    assert pretrain(elsewhere, "s", objective="dino-cb", seed=0).key in keys


def test_history_counts_every_log_point_once(ray_cluster, tmp_path):
    _, config = configs(tmp_path)
    stage = pretrain(config, "s", objective="dino-cb", seed=0)
    with pytest.raises(ConnectionError):
        stage.run(config, Breaks(tmp_path / "broke", 5, "raise"))
    stage.run(config, None)
    folder = open_place(config.results).child(stage.path)
    history = history_of(config, stage)
    assert history["step"].to_pylist() == list(range(1, 8))
    assert {"time_ms", "loss", "lr", "entropy", "entropy_of_mean", "images_per_s"} <= set(history.column_names)
    assert json.loads(folder.read("done.json"))["steps"] == 7
    assert folder.names("checkpoints") == []


def test_points_added_by_scoring_do_not_wear_out_the_guards_patience(ray_cluster, tmp_path):
    guarded = {"collapse": "stop", "collapse_floor": 0.0, "collapse_ceiling": 0.01, "collapse_patience": 2}
    config, _ = configs(tmp_path, dino=guarded, train={"log_every": 4, "knn_every": 1})
    stage = pretrain(config, "s", objective="dino", seed=0)
    assert stage.run(config, None)["steps"] == 7
    # Every point is out of bounds, and would have stopped the run at the second.
    often, _ = configs(tmp_path / "often", dino=guarded, train={"log_every": 1})
    with pytest.raises(Exception, match=r"step 2: the teacher collapsed: .*lower dino\.teacher_temperature"):
        pretrain(often, "s", objective="dino", seed=0).run(often, None)


def test_the_best_weights_on_the_held_out_plate_are_kept(ray_cluster, tmp_path):
    config = small_config(tmp_path, classify={"steps": 60, "minibatch": 16, "validate_every": 10, "lr": 3e-3, "lr_end": 3e-3})
    write_tiles(config, "s", batches=3)
    facts = classify(config, "s", seed=0, extractor=None).run(config, None)
    assert facts["best"]["score"] > 0.6
    assert facts["best"]["step"] in range(10, 61, 10)


def test_a_rate_that_falls_on_a_plateau_falls_at_the_same_steps_after_a_break(ray_cluster, tmp_path):
    # A rate at which loss and accuracy stand still; the fifth step is past a fall, and its checkpoint the last before.
    slow = {"steps": 10, "lr": 1e-7, "lr_start": 1e-7, "schedule": "plateau", "plateau_patience": 0, "validate_every": 1}
    first, second = configs(tmp_path, classify=slow)
    stage, broken = (classify(config, "s", seed=0, extractor=None) for config in (first, second))
    stage.run(first, None)
    with pytest.raises(ConnectionError):
        broken.run(second, Breaks(tmp_path / "broke", 5, "raise"))
    broken.run(second, None)
    straight, resumed = history_of(first, stage), history_of(second, broken)
    rates = straight["lr"].to_pylist()
    assert rates[0] == pytest.approx(1e-7)
    assert rates[-1] < 1e-12
    for name in ("lr", "held_out_cross_entropy", "held_out_accuracy"):
        assert resumed[name].to_pylist() == straight[name].to_pylist(), name
    assert_same(stage_tensors(first, stage), stage_tensors(second, broken))


def test_pre_training_keeps_the_weights_of_its_best_nearest_neighbours(ray_cluster, tmp_path):
    last, _ = configs(tmp_path, train={"knn_every": 1})
    best, _ = configs(tmp_path, train={"knn_every": 1}, pretrain={"steps": 7, "select": "best-knn"})
    stages = {config.pretrain.select: pretrain(config, "s", objective="dino", seed=0) for config in (last, best)}
    facts = {select: stage.run(last, None) for select, stage in stages.items()}
    scores = history_of(best, stages["best-knn"])["knn"].to_pylist()
    step = scores.index(max(scores)) + 1
    assert facts["best-knn"]["best"] == {"score": max(scores), "step": step}
    assert "best" not in facts["last"]
    there = paused(last, stages["last"], step)
    there.run(last, None)
    assert_same(stage_tensors(best, stages["best-knn"]), stage_tensors(last, there))


def test_how_often_and_by_which_labels_the_best_weights_are_looked_for_is_in_the_key(tmp_path):
    def keys(**sections):
        config, _ = configs(tmp_path, **sections)
        return pretrain(config, "s", objective="dino", seed=0).key

    best = {"steps": 7, "select": "best-knn"}
    assert keys(train={"knn_every": 2}) == keys(train={"knn_every": 3})
    assert len({keys(train={"knn_every": every}, pretrain=best) for every in (2, 3)} | {keys()}) == 3


@pytest.mark.parametrize(("text", "bounds"), [("0", (0, 0)), ("3", (3, 3)), ("1-4", (1, 4))])
def test_worker_ranges(text, bounds):
    assert small_config(Path("x"), train={"workers": text}).train.worker_range == bounds


def test_a_falling_range_of_workers_is_refused():
    with pytest.raises(ValueError, match=r"train\.workers = '4-2'"):
        small_config(Path("x"), train={"workers": "4-2"})


def on(config, workers):
    return config.model_copy(update={"train": config.train.model_copy(update={"workers": workers})})


@pytest.fixture(scope="module")
def alone(ray_cluster, tmp_path_factory):
    """A stage that ran inside one task, and the configurations of that run and of the same with results of its own."""
    sections = {
        "dino": {"drop_path": 0.0},
        "views": {"jitter_probability": 0.0},
        # Scores fall between log points: every rank must stop there.
        "train": {"log_every": 3, "knn_every": 2},
    }
    first, second = configs(tmp_path_factory.mktemp("groups"), **sections)
    stage = pretrain(first, "s", objective="dino-cb", seed=0)
    stage.run(first, None)
    return first, second, stage


@pytest.mark.long
def test_a_group_of_which_a_worker_dies_does_what_one_worker_does(alone, tmp_path):
    first, second, stage = alone
    grouped = pretrain(second, "s", objective="dino-cb", seed=0)
    tally = Tally()
    facts = grouped.run(on(second, "1-2"), Breaks(tmp_path / "died", 6, "exit"), tally.teller(grouped.key))
    assert ray.get(tally.actor.take.remote()) == {grouped.key: (7, 7)}
    assert (tmp_path / "died").exists()
    assert facts["workers"] == 2
    assert_same(stage_tensors(first, stage), stage_tensors(second, grouped), tolerance=2e-3)


@pytest.mark.long
def test_every_worker_of_a_group_follows_the_rate_that_falls_on_a_plateau(ray_cluster, tmp_path):
    slow = {"steps": 6, "lr": 1e-7, "lr_start": 1e-7, "schedule": "plateau", "plateau_patience": 0, "validate_every": 1}
    first, second = configs(tmp_path, classify=slow)
    alone, grouped = (classify(config, "s", seed=0, extractor=None) for config in (first, second))
    alone.run(first, None)
    grouped.run(on(second, "2"), None)
    rates = [history_of(config, stage)["lr"].to_pylist() for config, stage in ((first, alone), (second, grouped))]
    assert rates[0][-1] < 1e-10
    assert rates[1] == pytest.approx(rates[0])
    assert_same(stage_tensors(first, alone), stage_tensors(second, grouped), tolerance=2e-3)
