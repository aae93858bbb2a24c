"""The stream's promises, on a real local Ray cluster."""

import inspect
import re
import threading
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from coda_ray.config import Stream
from coda_ray.tiles import pause, reader
from coda_ray.tiles.plan import Partners, SamplePlan
from coda_ray.tiles.reader import TileSource
from coda_ray.tiles.store import COMPOUND, LABEL, read_tiles
from coda_ray.tiles.stream import Health, UnreadableTilesError, minibatches
from synthetic import SIDE, small_config, write_tiles

SETTINGS = Stream(rows_per_task=7, segment_steps=3)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    config = small_config(tmp_path_factory.mktemp("stream"))
    return write_tiles(config, "s", batches=3).index(["s"])


def source_of(index, seed=5, **options):
    codes = [pd.factorize(index.frame[name])[0].astype(np.int64) for name in (COMPOUND, "Metadata_Batch")]
    plan = SamplePlan(seed, np.arange(len(index)), Partners.build(*codes))
    return TileSource(index, plan, SIDE, **options)


def run(source, *, start=0, steps=7, rank=0, world=1, settings=SETTINGS):
    return list(minibatches(source, settings, minibatch=6, start_step=start, steps=steps, rank=rank, world=world))


def same(a, b):
    return all((a[name] == b[name]).all() for name in a) and a.keys() == b.keys()


def test_same_seed_same_samples_in_the_same_steps(ray_cluster, index):
    first, second = run(source_of(index)), run(source_of(index))
    assert len(first) == 7
    assert all(same(a, b) for a, b in zip(first, second, strict=True))
    other = run(source_of(index, seed=6))
    assert not all(same(a, b) for a, b in zip(first, other, strict=True))


def test_it_resumes_at_any_step(ray_cluster, index):
    whole, rest = run(source_of(index)), run(source_of(index), start=4)
    assert all(same(a, b) for a, b in zip(whole[4:], rest, strict=True))


def test_tasks_and_segments_change_nothing(ray_cluster, index):
    whole, other = run(source_of(index)), run(source_of(index), settings=Stream(rows_per_task=64, prefetch=0))
    assert all(same(a, b) for a, b in zip(whole, other, strict=True))


def test_ray_datas_loop_rests_longer_while_tiles_wait(ray_cluster, index, monkeypatch):
    rests, held = set(), threading.Event()

    def rest(seconds):
        rests.add(seconds)
        if seconds == pause.WAITING_PAUSE_S:
            held.set()
        time.sleep(0.01)

    monkeypatch.setattr(pause, "time", SimpleNamespace(sleep=rest))
    stream = minibatches(source_of(index), Stream(rows_per_task=7), minibatch=6, start_step=0, steps=60)
    first = next(stream)
    assert pause.WANTED_PAUSE_S in rests
    assert held.wait(60)
    assert len([first, *stream]) == 60


def test_a_cache_holds_what_was_read_and_changes_nothing(ray_cluster, index, tmp_path):
    whole = run(source_of(index))
    cached = Stream(rows_per_task=7, cache=str(tmp_path / "cache"))
    for _ in range(2):
        assert all(same(a, b) for a, b in zip(whole, run(source_of(index), settings=cached), strict=True))
    kept = {str(path.relative_to(path.parents[3])) for path in (tmp_path / "cache").rglob("*.npy")}
    assert kept == set(index.frame["shard"])


@pytest.mark.parametrize("world", [2, 4])
def test_the_number_of_workers_changes_no_sample(ray_cluster, index, world):
    whole = run(source_of(index))
    shares = [run(source_of(index), rank=rank, world=world) for rank in range(world)]
    for step, expected in enumerate(whole):
        for name in expected:
            joined = np.concatenate([share[step][name].numpy() for share in shares])
            np.testing.assert_array_equal(joined, expected[name].numpy())


def test_every_pair_is_the_same_compound_in_another_batch_and_carries_its_pixels(ray_cluster, index):
    source = source_of(index)
    for tensors in run(source):
        anchors, partners = source.plan.rows(tensors["sample"].numpy())
        assert partners is not None
        np.testing.assert_array_equal(anchors, tensors["row"].numpy())
        frame = index.frame
        assert (frame[COMPOUND].to_numpy()[anchors] == frame[COMPOUND].to_numpy()[partners]).all()
        assert (frame["Metadata_Batch"].to_numpy()[anchors] != frame["Metadata_Batch"].to_numpy()[partners]).all()
        for name, rows in (("tile", anchors), ("partner", partners)):
            np.testing.assert_array_equal(tensors[name].numpy(), np.stack(read_tiles(index, rows, SIDE)))


def test_no_label_and_no_metadata_is_in_the_stream(ray_cluster, index):
    source = source_of(index)
    assert not [name for name in source.index.frame if name.startswith("Metadata_")]
    assert set(run(source, steps=1)[0]) == {"sample", "row", "replaced", "readable", "tile", "partner"}
    assert not {LABEL, "LABEL"} & set(re.findall(r"\w+", inspect.getsource(reader)))


def test_labels_come_only_when_asked_for(ray_cluster, index):
    labels = np.arange(len(index), dtype=np.int64) * 3
    tensors = run(source_of(index, labels=labels), steps=1)[0]
    np.testing.assert_array_equal(tensors["label"].numpy(), labels[tensors["row"].numpy()])


@pytest.fixture
def damaged(tmp_path):
    """A store with one damaged tile, and its row."""
    store = write_tiles(small_config(tmp_path), "s", batches=3)
    index = store.index(["s"])
    row = 9
    shard, offset = index.frame["shard"][row], int(index.frame["offset"][row])
    data = bytearray(store.folder.read(shard))
    data[offset : offset + 5] = b"\x00\x01\x02\x03\x04"
    store.folder.write(shard, bytes(data))
    return index, row


def test_a_tile_that_fails_is_replaced_counted_and_reported(ray_cluster, damaged, caplog):
    index, row = damaged
    source = source_of(index)
    steps = 2 * len(index) // 6
    clean = [source.plan.rows(np.arange(s * 6, s * 6 + 6)) for s in range(steps)]
    expected = sum(int((anchors == row).sum() + (partners == row).sum()) for anchors, partners in clean)
    assert expected > 0
    lenient = Stream(rows_per_task=8, max_bad_share=0.5)
    found = run(source, steps=steps, settings=lenient)
    assert sum(int(tensors["replaced"].sum()) for tensors in found) >= expected
    for (anchors, _), tensors in zip(clean, found, strict=True):
        assert tensors["readable"].all()
        assert not (tensors["row"] == row).any()
        untouched = (tensors["replaced"] == 0).numpy()
        np.testing.assert_array_equal(tensors["row"].numpy()[untouched], anchors[untouched])
    assert "damaged tile" in caplog.text
    again = run(source, steps=steps, settings=lenient)
    assert all(same(a, b) for a, b in zip(found, again, strict=True))


def test_too_many_failing_tiles_stop_the_run(ray_cluster, index, tmp_path):
    store = write_tiles(small_config(tmp_path), "s", batches=2)
    index = store.index(["s"])
    store.folder.delete(index.frame["shard"].iloc[0])
    with pytest.raises(UnreadableTilesError, match=r"above stream\.max_bad_share = 0\.01.*jobs/ingest\.py"):
        run(source_of(index), steps=200)


def test_a_tile_that_is_only_looked_at_is_marked_not_replaced(ray_cluster, damaged):
    index, row = damaged
    plan = SamplePlan(0, np.arange(len(index)), shuffle=False)
    source = TileSource(index, plan, SIDE, replace=False)
    found = list(
        minibatches(source, Stream(max_bad_share=0.5), minibatch=8, start_step=0, steps=-(-len(index) // 8), last=len(index))
    )
    rows = np.concatenate([tensors["row"].numpy() for tensors in found])
    np.testing.assert_array_equal(rows, np.arange(len(index)))
    readable = np.concatenate([tensors["readable"].numpy() for tensors in found])
    assert np.flatnonzero(~readable).tolist() == [row]


def test_more_workers_than_samples_are_refused(index):
    with pytest.raises(ValueError, match="minibatch = 2"):
        next(minibatches(source_of(index), SETTINGS, minibatch=2, start_step=0, steps=1, rank=0, world=3))


def columns_of(n, bad=(), *, lost=(), reasons=(), partner=False):
    """What a read task hands back, without the images."""
    at = np.arange(n)
    reason = np.full(n, "", object)
    reason[list(bad)] = reasons or "damaged"
    columns = {
        "sample": at,
        "replaced": np.isin(at, bad).astype(np.int32),
        "readable": ~np.isin(at, lost),
        "reason": reason.astype(str),
    }
    return columns | ({"partner": at} if partner else {})


def test_one_damaged_tile_alone_in_the_last_minibatch_stops_no_evaluation():
    health = Health(0.01, replace=False)
    health.count(columns_of(256))
    health.count(columns_of(1, [0], lost=[0]))
    assert (health.bad, health.read) == (1, 257)


@pytest.mark.parametrize("partner", [False, True])
def test_a_sample_without_a_readable_replacement_stops_training(partner):
    health = Health(0.5, replace=True)
    health.count(columns_of(256, [7], partner=partner))
    with pytest.raises(UnreadableTilesError, match=r"sample 3 and its 8 replacements could not be read; .*(?<!max_bad_share)$"):
        health.count(columns_of(256, [3], lost=[3], partner=partner))


def test_the_message_gives_the_most_frequent_reason():
    health = Health(0.02, replace=False)
    with pytest.raises(
        UnreadableTilesError, match=r"3 of 100 .*above stream.max_bad_share = 0.02; .* reason: often; delete.* or raise stream"
    ):
        health.count(columns_of(100, [1, 2, 3], reasons=["often", "often", "once"]))
