import io

import numpy as np
import pandas as pd
import pytest

from coda_ray.storage import Place, open_place
from coda_ray.tiles.store import COMPOUND, LABEL, TileStore, content_key, read_tiles

PREPARATION = {"channels": ["DNA", "ER"], "scale": 0.5}


@pytest.fixture
def filled(tmp_path):
    """A store of two plates of two shards each, and the pixels that went in."""
    store = TileStore.open(open_place(Place(address=str(tmp_path))), PREPARATION)
    rng = np.random.default_rng(0)
    pixels = []
    for batch in ("b1", "b2"):
        path = store.plate_path("s", batch, f"{batch}p")
        frames = []
        for number in range(2):
            tiles = rng.integers(0, 256, (3, 2, 20, 24), dtype=np.uint8)
            pixels.append(tiles)
            frame = store.write_shard(path, number, tiles)
            frame["Metadata_Source"], frame["Metadata_Batch"], frame["Metadata_Plate"] = "s", batch, f"{batch}p"
            frame["Metadata_Well"], frame["Metadata_Site"] = "A01", [f"{number}{i}" for i in range(3)]
            frame[COMPOUND], frame[LABEL] = "c", [None, "moa", "moa"]
            frames.append(frame)
        store.finish_plate(path, pd.concat(frames), pd.DataFrame(), {"seconds": 1})
    return store, np.concatenate(pixels)


def test_tiles_come_back_as_written(filled):
    store, pixels = filled
    index = store.index(["s"])
    assert len(index) == 12
    rows = np.array([11, 0, 5])
    found = read_tiles(index, rows, 20)
    for tile, row in zip(found, rows, strict=True):
        np.testing.assert_array_equal(tile, pixels[row][:, :, 2:22])


def test_shards_are_plain_numpy_files(filled):
    store, pixels = filled
    data = store.folder.read(store.index(["s"]).frame["shard"][0])
    np.testing.assert_array_equal(np.load(io.BytesIO(data), allow_pickle=False), pixels[:3])


def test_a_plate_counts_only_when_finished(filled):
    store, _ = filled
    assert store.plates() == ["s/b1/b1p", "s/b2/b2p"]
    store.folder.delete("s/b2/b2p/plate.json")
    assert store.plates() == ["s/b1/b1p"]
    with pytest.raises(FileNotFoundError, match=r"no finished plate of 'other'.*jobs/ingest\.py"):
        store.index(["other"])


def test_damaged_and_small_tiles_are_told(filled):
    store, _ = filled
    index = store.index(["s"])
    shard = index.frame["shard"][0]
    data = bytearray(store.folder.read(shard))
    data[int(index.frame["offset"][1])] ^= 1
    store.folder.write(shard, bytes(data))
    good, bad = read_tiles(index, np.array([0, 1]), 20)
    assert isinstance(good, np.ndarray)
    assert isinstance(bad, ValueError)
    assert "damaged" in str(bad)
    (small,) = read_tiles(index, np.array([0]), 21)
    assert "smaller than views.tile_crop = 21" in str(small)


def test_fingerprint_follows_content_and_ignores_what_was_dropped(filled):
    store, _ = filled
    index = store.index(["s"])
    assert store.index(["s"]).fingerprint == index.fingerprint
    relabelled = index.frame.assign(**{LABEL: "noise"})
    other = type(index)(relabelled, index.folder, index.channels)
    assert other.fingerprint != index.fingerprint
    assert other.without_labels().fingerprint == index.without_labels().fingerprint
    assert LABEL not in index.without_labels().frame
    assert index.unit("batch", "b1").fingerprint != index.unit("batch", "b2").fingerprint


def test_units_and_labels(filled):
    index = filled[0].index(["s"])
    assert index.units("batch") == ["b1", "b2"]
    assert len(index.unit("plate", "b2p")) == 6
    assert len(index.labelled()) == 8


def test_content_key_ignores_the_order_of_keys():
    assert content_key({"a": 1, "b": [1, 2]}) == content_key({"b": [1, 2], "a": 1})
    assert content_key({"a": 1}) != content_key({"a": 2})
