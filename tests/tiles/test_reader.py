import pickle
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from coda_ray import storage
from coda_ray.storage import Folder
from coda_ray.tiles.plan import SamplePlan
from coda_ray.tiles.reader import TileSource
from coda_ray.tiles.store import TileIndex, read_tiles
from synthetic import SIDE, small_config, write_tiles


@pytest.fixture
def index(tmp_path):
    return write_tiles(small_config(tmp_path), "s").index(["s"])


def source_of(index, **options):
    return TileSource(index, SamplePlan(0, np.arange(len(index)), shuffle=False), SIDE, **options)


def test_a_network_error_is_raised_and_is_no_broken_tile(index, monkeypatch):
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.0)
    monkeypatch.setattr(index.folder.fs, "cat_ranges", lambda paths, *_, **__: [OSError("connection reset")] * len(paths))
    for replaced in (True, False):
        with pytest.raises(OSError, match=r"shard-00000.npy: gave up after 5 attempts"):
            source_of(index, replace=replaced).read(np.arange(3))


def test_a_missing_shard_is_a_broken_tile(index):
    index.folder.delete(index.frame["shard"][0])
    found = source_of(index, replace=False).read(np.array([0, len(index) - 1]))
    assert found["readable"].tolist() == [False, True]
    assert found["reason"].tolist() == [f"{index.frame['shard'][0]}: shard is missing", ""]


def damage(folder, shard, byte):
    data = bytearray(folder.read(shard))
    data[byte] ^= 1
    folder.write(shard, bytes(data))


def test_a_damaged_copy_is_read_from_storage_and_made_anew(index, tmp_path):
    source = source_of(index, cache=str(tmp_path / "cache"), replace=False)
    whole = source.read(np.arange(len(index)))
    copy = source._near(np.arange(len(index))).folder
    shard, offset = index.frame["shard"][0], int(index.frame["offset"][0])
    damage(copy, shard, offset)
    again = source.read(np.arange(len(index)))
    assert again["readable"].all()
    np.testing.assert_array_equal(again["tile"], whole["tile"])
    assert not copy.exists(shard)
    damage(index.folder, shard, offset)
    assert np.flatnonzero(~source.read(np.arange(len(index)))["readable"]).tolist() == [0]
    assert copy.exists(shard)


def test_servers_do_not_share_a_cache(index, tmp_path):
    def near(url):
        folder = Folder(SimpleNamespace(endpoint_url=url), "bucket/tiles")
        source = source_of(TileIndex(index.frame, folder, index.channels), cache=str(tmp_path))
        return source._near(np.array([], np.int64)).folder.root

    assert near("http://one") == near("http://one") != near("http://two")


def test_what_is_shipped_is_small_and_reads_alike(index):
    rows = np.array([3, 0, 27])
    frames = [index.frame.assign(shard=index.frame["shard"].str.replace("shard-0", f"shard-{i}")) for i in range(100)]
    large = pd.concat(frames * 30, ignore_index=True)
    source = source_of(TileIndex(large, index.folder, index.channels))
    assert len(large) == 84_000
    assert len(pickle.dumps(source)) < 30 * len(large)
    slim = replace(source_of(index), crop=SIDE).index
    for tile, expected in zip(read_tiles(slim, rows, SIDE), read_tiles(index, rows, SIDE), strict=True):
        np.testing.assert_array_equal(tile, expected)
    high = index.frame.assign(offset=2**40, crc32=2**32 - 1)
    kept = source_of(TileIndex(high, index.folder, index.channels)).index.frame
    assert (kept["offset"].tolist()[0], kept["crc32"].tolist()[0]) == (2**40, 2**32 - 1)
