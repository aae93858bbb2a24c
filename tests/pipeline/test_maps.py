"""Maps of features: the same tiles in both states, in one projection."""

import numpy as np
import pandas as pd
import pytest

from coda_ray.pipeline import data, maps
from coda_ray.pipeline.evaluate import TILE_ID, evaluate
from coda_ray.pipeline.maps import map_features, map_of
from coda_ray.pipeline.stage import Stage
from synthetic import small_config, write_tiles


@pytest.fixture
def planned(tmp_path):
    config = small_config(tmp_path, report={"map_tiles": 10})
    write_tiles(config, "b")
    index = data.load_tiles(config, "b")
    model = [Stage("classify", name, {"name": name}, lambda folder, report: None) for name in ("one", "other")]
    return config, index, [evaluate(config, index, "b", classifier) for classifier in model]


def test_each_tile_has_a_place_before_and_after(planned, ray_cluster, monkeypatch):
    config, index, (before, after) = planned
    rows = index.frame[TILE_ID].assign(feature_0000=np.arange(len(index), dtype=np.float32))
    shuffled = rows.sample(frac=1, random_state=0).assign(feature_0000=lambda frame: frame["feature_0000"] + 100)
    drawn = data.drawn(index, 10)
    lost = drawn.frame[TILE_ID].iloc[[3]]
    mask = pd.MultiIndex.from_frame(shuffled[TILE_ID]).isin(pd.MultiIndex.from_frame(lost))
    tables = {before.key: rows, after.key: shuffled[~mask]}
    monkeypatch.setattr(maps, "embeddings_of", lambda config, stage: tables[stage.key])
    monkeypatch.setattr(maps, "project", lambda features, seed: np.repeat(features, 2, axis=1))
    stage = map_features(config, index, before, after)
    assert stage.run(config, None)["tiles"] == 9
    found = map_of(config, stage)
    left, right = (found[found["state"] == state].reset_index(drop=True) for state in ("before", "after"))
    pd.testing.assert_frame_equal(left[TILE_ID], right[TILE_ID])
    np.testing.assert_array_equal(left["x"] + 100, right["x"])
    assert set(left["x"]) < set(range(len(index)))
    assert len(set(left["x"])) == 9


def test_a_map_is_named_by_its_tiles_and_evaluations(planned):
    config, index, (before, after) = planned
    stage = map_features(config, index, before, after)
    assert stage.key == map_features(config, index.without_labels(), before, after).key
    assert stage.key != map_features(config, index, after, before).key
    assert stage.key != map_features(config, index.where(np.arange(len(index)) > 0), before, after).key
