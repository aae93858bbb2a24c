"""Which tiles are learnt from, held out and scored, by `learn_from` and `split`: selections alone, no training."""

import numpy as np
import pytest

from coda_ray.pipeline import data
from coda_ray.pipeline.methods.continued import adapt
from coda_ray.pipeline.request import Request
from coda_ray.pipeline.train_stages import classify, pretrain
from coda_ray.pipeline.transfer import plan, stages_of
from coda_ray.tiles.store import COMPOUND, LABEL
from synthetic import model_on, small_config, write_tiles

EVERY = {f"c{moa}{number}" for moa in range(3) for number in range(2)}


@pytest.fixture
def labs(tmp_path, monkeypatch):
    """Labs a and b, with a place for a change of the labels that are read: of a lab's index, a new one of its frame's."""
    config, true, changes = small_config(tmp_path), data.load_tiles, {}
    for source in ("a", "b"):
        write_tiles(config, source, batches=3)

    def loaded(config, source):
        index = true(config, source)
        if source not in changes:
            return index
        return type(index)(index.frame.assign(**{LABEL: changes[source](index.frame)}), index.folder, index.channels)

    monkeypatch.setattr(data, "load_tiles", loaded)
    return config, changes


def known(config):
    return config.model_copy(update={"learn_from": "known-compounds"})


def stages(config):
    pretrained = pretrain(config, "a", objective="dino-cb", seed=0)
    return pretrained, adapt(config, model_on(pretrained), "b", granularity="source", unit="b", seed=0)


def compounds(index):
    return set(index.frame[COMPOUND])


def test_only_compounds_with_a_label_somewhere_in_the_source_are_learnt_from(labs):
    config, changes = labs

    def told(frame):
        # One compound has no label at all, another on one plate alone; the target has all, which count for nothing.
        elsewhere = (frame[COMPOUND] == "c10") & (frame["Metadata_Batch"] != "b1")
        return frame[LABEL].mask((frame[COMPOUND] == "c00") | elsewhere)

    changes["a"] = told
    assert set(data.known_compounds(config, "a")) == EVERY - {"c00"}
    assert compounds(data.pretraining_tiles(config, "a")) == EVERY | {"DMSO"}
    chosen = known(config)
    assert compounds(data.pretraining_tiles(chosen, "a")) == EVERY - {"c00"}
    assert compounds(data.training_tiles(chosen, "a")) == EVERY | {"DMSO"}
    adapted = data.adaptation_tiles(chosen, "a", "b", "batch", "b1")
    assert compounds(adapted.pool) == compounds(adapted.anchored()) == EVERY - {"c00"}
    assert LABEL not in adapted.pool.frame
    # What is scored, and what corrections are fitted to, stays.
    assert compounds(data.target_tiles(chosen, "a", "b")) == EVERY | {"DMSO"}
    assert compounds(data.scored(chosen, "a", data.load_tiles(chosen, "b"), ["moa 0"])) == {"c00", "c01"}


def test_an_epoch_counts_the_tiles_that_are_learnt_from(labs):
    config, _ = labs
    in_epochs = {name: getattr(config, name).model_copy(update={"steps": "2 epochs"}) for name in ("pretrain", "adapt")}
    config = config.model_copy(update=in_epochs)
    # 14 tiles a plate, 2 of them of DMSO; 2 plates of the source and 3 of the target; mini-batches of 8.
    for chosen, tiles in ((config, 14), (known(config), 12)):
        steps = [stage.workload.steps for stage in stages(chosen)]
        assert steps == [2 * (2 * tiles // 8), 2 * (3 * tiles // 8)]


def test_labels_that_are_noise_among_the_known_compounds_reach_no_training_without_labels(labs):
    config, changes = labs
    chosen = known(config)
    before = [stage.key for stage in stages(chosen)]
    labelled = classify(chosen, "a", seed=0, extractor=None).key
    assert before != [stage.key for stage in stages(config)]
    rng = np.random.default_rng(0)
    changes["a"] = changes["b"] = lambda frame: frame[LABEL].where(
        frame[LABEL].isna(), [f"moa {number}" for number in rng.integers(3, size=len(frame))]
    )
    assert [stage.key for stage in stages(chosen)] == before
    assert classify(chosen, "a", seed=0, extractor=None).key != labelled


def test_where_no_compound_is_known_nothing_can_be_learnt_from(labs):
    config, changes = labs
    changes["a"] = lambda frame: frame[LABEL].mask(frame[LABEL].notna())
    told = r"learn_from = known-compounds: no tile of {} has a compound with a MoA label in a; give .* or learn_from all"
    with pytest.raises(data.DataError, match=told.format("a")):
        data.pretraining_tiles(known(config), "a")
    with pytest.raises(data.DataError, match=told.format("b")):
        data.adaptation_tiles(known(config), "a", "b", "source", "b")


def split(config, name):
    return config.model_copy(update={"split": name})


def test_new_compounds_are_in_the_adaptation_without_labels_and_in_no_training_on_the_source(labs):
    config, _ = labs
    held, new = split(config, "compounds"), split(config, "new-compounds")
    names = set(data.held_out_compounds(held, "a"))
    assert names
    assert set(data.held_out_compounds(new, "a")) == names
    assert not names & compounds(data.training_tiles(new, "a"))
    assert not names & compounds(data.adaptation_tiles(held, "a", "b", "source", "b").pool)
    adapted = data.adaptation_tiles(new, "a", "b", "source", "b")
    assert names < compounds(adapted.anchored())
    assert LABEL not in adapted.pool.frame
    assert names < compounds(data.target_tiles(new, "a", "b"))
    target, classes = data.load_tiles(new, "b"), data.classes_of(new, "a")
    assert compounds(data.scored(new, "a", target, classes)) == names
    assert data.scored(new, "a", target, classes).fingerprint == data.scored(held, "a", target, classes).fingerprint
    # A label of theirs is not known either.
    assert compounds(data.adaptation_tiles(known(new), "a", "b", "source", "b").pool) == EVERY - names


def test_both_splits_that_hold_compounds_out_share_what_is_trained_on_the_source(labs):
    config, _ = labs

    def planned(name, kinds):
        found = stages_of(plan(config, Request("a", "b", "coda", "source", 0, name)))
        return {(stage.key, stage.title) for stage in found if stage.kind in kinds}

    source, target = ("pretrain", "classify"), ("adapt",)
    assert planned("new-compounds", source) == planned("compounds", source)
    assert planned("new-compounds", source).isdisjoint(planned("plate", source))
    assert planned("new-compounds", target).isdisjoint(planned("compounds", target) | planned("plate", target))
    ((_, title),) = planned("new-compounds", target)
    assert title.endswith("seed 0, new compounds")
