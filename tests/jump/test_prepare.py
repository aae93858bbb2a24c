import io
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile

from coda_ray.config import Config
from coda_ray.jump import prepare
from coda_ray.jump.prepare import BadImageError

REAL_DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def tiff(image, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, image, **options)
    return buffer.getvalue()


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def field(shape=(40, 30), seed=0):
    return np.random.default_rng(seed).integers(100, 4000, shape).astype(np.uint16)


def triangle_weights(size_in, size_out):
    """Rows of weights of an anti-aliasing triangle filter, one output pixel after the other."""
    step = size_in / size_out
    reach = max(step, 1.0)
    rows = []
    for i in range(size_out):
        centre = (i + 0.5) * step
        row = [max(0.0, 1 - abs(j + 0.5 - centre) / reach) for j in range(size_in)]
        rows.append([weight / sum(row) for weight in row])
    return np.array(rows)


@pytest.mark.parametrize("shape", [(20, 15), (18, 13), (40, 30), (55, 44)])
def test_resize_is_a_triangle_filter_that_widens_with_the_reduction(shape):
    image = field().astype(np.float32)
    expected = triangle_weights(40, shape[0]) @ image @ triangle_weights(30, shape[1]).T
    np.testing.assert_allclose(prepare.resize(image, shape), expected, rtol=1e-5)


def test_resize_does_not_alias():
    fine = np.tile(np.array([0.0, 1000.0], np.float32), (64, 32))
    assert prepare.resize(fine, (24, 24))[4:-4, 4:-4].std() < 60


@pytest.mark.parametrize("cap", [math.inf, 2500.0])
def test_stretch_against_sorting(cap):
    image = field(seed=3).astype(np.float32)

    def percentile(share):
        ordered, place = np.sort(image.ravel()), share / 100 * (image.size - 1)
        low = int(place)
        return ordered[low] + (place - low) * (ordered[low + 1] - ordered[low])

    low, high = percentile(2.0), min(percentile(97.0), cap)
    expected = [[round(255 * min(max((float(v) - low) / (high - low), 0), 1)) for v in row] for row in image]
    got = prepare.stretch(image, (2.0, 97.0), cap)
    assert got.dtype == np.uint8
    assert np.abs(got.astype(int) - np.array(expected)).max() <= 1
    assert (got == np.array(expected)).mean() > 0.99
    assert (got.min(), got.max()) == (0, 255)


def test_stretch_refuses_what_has_no_contrast():
    image = np.full((10, 10), 7.0, np.float32)
    image[0, 0] = 9
    with pytest.raises(BadImageError, match="no contrast"):
        prepare.stretch(image, (1.0, 99.0 - 1e-9), 7.0)


def test_correct_divides_at_full_size_and_then_resizes():
    image = field()
    illumination = np.random.default_rng(1).uniform(0.5, 1.5, image.shape).astype(np.float32)
    divided = np.array([[int(v) / f for v, f in zip(*rows, strict=True)] for rows in zip(image, illumination, strict=True)])
    expected = prepare.resize(divided.astype(np.float32), (20, 15))
    np.testing.assert_allclose(prepare.correct(image, illumination, (20, 15)), expected, rtol=1e-5)


def test_correct_resizes_an_illumination_function_of_the_same_aspect_ratio():
    ramp = np.linspace(0.5, 1.5, 300, dtype=np.float32)[None].repeat(400, 0)
    image = (1000 * ramp).round().astype(np.uint16)
    small = prepare.resize(ramp, (200, 150))
    flat = prepare.correct(image, small, (200, 150))
    assert flat[:, 4:-4].std() / flat.mean() < 0.005
    with pytest.raises(BadImageError, match="illumination function is 40x40 px, the image 40x30"):
        prepare.correct(field(), np.ones((40, 40), np.float32), (20, 15))


def test_illumination_estimate_finds_the_vignette_and_not_the_cells():
    rng = np.random.default_rng(5)
    y, x = np.mgrid[-1:1:160j, -1:1:160j]
    vignette = 1 / (1 + 0.5 * (x**2 + y**2))
    fields = []
    for _ in range(60):
        scene = np.full(vignette.shape, 300.0)
        for cy, cx in rng.integers(0, 160, (25, 2)):
            scene[max(cy - 6, 0) : cy + 6, max(cx - 6, 0) : cx + 6] += 2000
        fields.append((scene * vignette).astype(np.uint16))
    got = prepare.estimate_illumination(fields)
    assert got.shape == (160, 160)
    assert got.dtype == np.float32
    assert got.mean() == pytest.approx(1, abs=1e-4)
    left = vignette / got
    assert left.std() / left.mean() < 0.3 * vignette.std() / vignette.mean()


def test_illumination_estimate_needs_an_image():
    with pytest.raises(ValueError, match="at least one image"):
        prepare.estimate_illumination([])


@pytest.mark.parametrize("compression", [None, "lzw", "zlib"])
@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_read_image(compression, byteorder):
    image = field()
    got = prepare.read_image(tiff(image, compression=compression, byteorder=byteorder))
    assert got.dtype == np.uint16
    assert (got == image).all()


def broken_images():
    image = field((64, 64))
    whole, packed = tiff(image), tiff(image, compression="lzw")
    hole = field((64, 64))
    yield "file is empty or zero-filled", bytes(len(whole))
    yield "file is empty or zero-filled", b""
    yield "file is not a TIFF", b"\x89PNG" + whole
    for data in (whole, packed):
        for kept in (4, 100, len(data) // 3, len(data) - 3):
            yield "TIFF is truncated or damaged", data[:kept]
    yield "all pixels are zero", tiff(np.zeros((64, 64), np.uint16))
    yield "all pixels have one value", tiff(np.full((64, 64), 9, np.uint16))
    yield "pixels are uint8, not uint16", tiff(hole.astype(np.uint8))
    yield "pixels are float32, not uint16", tiff(hole.astype(np.float32))
    yield "TIFF has 2 pages, not 1", tiff(np.stack([image, image]), photometric="minisblack")
    yield "image has shape 64x64x3, not two dimensions", tiff(np.stack([image] * 3, -1), photometric="rgb")


@pytest.mark.parametrize(("reason", "data"), list(broken_images()))
def test_broken_images_say_why(reason, data):
    with pytest.raises(BadImageError) as caught:
        prepare.read_image(data)
    assert str(caught.value) == reason


def test_a_strip_without_bytes_is_damage():
    data = bytearray(tiff(field((64, 64)), rowsperstrip=32))
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as file:
        tag = file.pages.first.tags["StripByteCounts"]
    data[tag.valueoffset : tag.valueoffset + tag.valuebytecount] = bytes(tag.valuebytecount)
    with pytest.raises(BadImageError, match="damaged"):
        prepare.read_image(bytes(data))


def test_read_illumination_keeps_the_form_and_sets_the_mean():
    function = np.random.default_rng(0).uniform(0.01, 0.02, (12, 10))
    got = prepare.read_illumination(npy(function))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, function / function.mean(), rtol=1e-6)


@pytest.mark.parametrize(
    ("reason", "data"),
    [
        ("not a .npy array", b"no array"),
        ("not a .npy array", npy(np.ones((8, 8)))[:-9]),
        ("not a .npy array", npy(np.array([{"pickled": 1}], dtype=object))),
        ("not a 2-D array", npy(np.ones((8, 8, 2)))),
        ("not positive", npy(np.zeros((8, 8)))),
        ("not positive", npy(np.array([[1.0, math.nan]]))),
    ],
)
def test_broken_illumination_says_why(reason, data):
    with pytest.raises(BadImageError, match=reason):
        prepare.read_illumination(data)


def test_preparation_holds_exactly_what_decides_pixels():
    def with_ingest(**changes):
        return prepare.preparation_of(Config(ingest={**Config().ingest.model_dump(), **changes}))

    base = prepare.preparation_of(Config())
    for change in (
        {"channels": ["DNA", "RNA", "AGP"]},
        {"scale": 0.25},
        {"pixel_size_um": 1.2},
        {"clip_percentiles": (1.0, 99.0)},
        {"plate_percentile": 99.9},
        {"plate_sample": 8},
    ):
        assert with_ingest(**change) != base
    assert with_ingest(threads=1, tiles_per_shard=2, max_bad_share=1.0, sources=["a"], cpus_per_task=1.0) == base


def test_real_images_read_as_the_manifest_says():
    manifest = REAL_DATA / "real-images" / "manifest.csv"
    if not manifest.exists():
        pytest.skip(f"{manifest} is not there")
    rows = pd.read_csv(manifest)
    rows = pd.concat([rows[rows["dataset"].str.startswith("cpg")].iloc[::4], rows.tail(1)])
    for row in rows.itertuples():
        image = prepare.read_image((manifest.parent / row.file).read_bytes())
        assert image.shape == (row.height, row.width)
        assert (image.min(), image.max(), np.median(image)) == (row.min, row.max, row.median)
