"""From a raw image to one channel of a tile: illumination, down-scaling, clipping, 8 bits; and what disqualifies an image.

The order is DeepProfiler's (Moshkov et al. 2024, "Learning representations for image-based profiling of perturbations",
Methods), as CODA used it: divide by the illumination function, resize with anti-aliasing, clip to percentiles of the image
whose upper one is capped by the plate's, stretch to 8 bits. Arrays in, arrays out; nothing here touches storage.
"""

import io
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from coda_ray.config import Config, Ingest

# Raised whenever the same settings would give other pixels.
PREPARATION_VERSION = 1
# Settings of the `ingest` section that decide a tile's pixels.
PIXEL_SETTINGS = (
    "channels",
    "scale",
    "pixel_size_um",
    "clip_percentiles",
    "plate_percentile",
    "plate_sample",
)
# The illumination estimate is smoothed by a Gaussian of this share of the image's side: wider than any cell.
SMOOTHING_SHARE = 0.125
_SMOOTHING_SIDE = 128
# Relative difference of aspect ratio up to which an illumination function is resized to the image.
_ASPECT_TOLERANCE = 0.01

Floats = NDArray[np.float32]
# What tifffile says about damaged tags, the quarantine table says once.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)


class BadImageError(ValueError):
    """An image that cannot become a tile; its text is the reason that the quarantine table gives."""


def preparation_of(config: Config) -> dict[str, Any]:
    """Name exactly the settings that decide a tile's pixels.

    Parameters
    ----------
    config
        The whole configuration.

    Returns
    -------
    dict
        JSON-able; the key under which `TileStore.open` finds the tiles.
    """
    settings = config.ingest.model_dump(mode="json", include=set(PIXEL_SETTINGS))
    return {"version": PREPARATION_VERSION, **settings}


def read_image(data: bytes) -> NDArray[np.uint16]:
    """Decode a raw image and check it.

    Parameters
    ----------
    data
        Content of a TIFF file.

    Returns
    -------
    ndarray
        (H, W) uint16.

    Raises
    ------
    BadImageError
        When the file is zero-filled, truncated or no TIFF, holds anything but one 2-D uint16 page, or one value only.
    """
    if data[:2] not in (b"II", b"MM"):
        raise BadImageError("file is empty or zero-filled" if not any(data) else "file is not a TIFF")
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as tiff:
            page = _only_page(tiff, len(data))
            image = page.asarray()
    except BadImageError:
        raise
    except Exception as error:  # decoders raise anything on damaged bytes
        raise BadImageError("TIFF is truncated or damaged") from error
    low, high = int(image.min()), int(image.max())
    if low == high:
        raise BadImageError("all pixels are zero" if high == 0 else "all pixels have one value")
    return np.ascontiguousarray(image, dtype=np.uint16)


def _only_page(tiff: tifffile.TiffFile, size: int) -> tifffile.TiffPage:
    """Give the one page of a TIFF, its kind checked before a pixel is decoded."""
    if len(tiff.pages) != 1:
        raise BadImageError(f"TIFF has {len(tiff.pages)} pages, not 1")
    page = tiff.pages.first
    if page.dtype is None or page.dtype.newbyteorder("=") != np.uint16:
        raise BadImageError(f"pixels are {page.dtype}, not uint16")
    if len(page.shape) != 2:
        raise BadImageError(f"image has shape {'x'.join(map(str, page.shape))}, not two dimensions")
    strips = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    # tifffile fills a strip without bytes with zeros.
    if not strips or any(not count or offset + count > size for offset, count in strips):
        raise BadImageError("TIFF is truncated or damaged")
    return page


def read_illumination(data: bytes) -> Floats:
    """Decode an illumination function and scale it to a mean of 1.

    The scale cancels in the final stretch; with it fixed, the intensities of all plates stay in raw units.

    Parameters
    ----------
    data
        Content of a `.npy` file.

    Returns
    -------
    ndarray
        (H, W) float32, positive.

    Raises
    ------
    BadImageError
        When it is no array of two dimensions with positive, finite values.
    """
    try:
        function = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise BadImageError("illumination file is not a .npy array") from error
    if not isinstance(function, np.ndarray) or function.ndim != 2 or function.dtype.kind not in "fiu":
        raise BadImageError("illumination function is not a 2-D array of numbers")
    if not np.isfinite(function).all() or function.min() <= 0:
        raise BadImageError("illumination function has values that are not positive")
    return np.asarray(function / function.mean(dtype=np.float64), dtype=np.float32)


def estimate_illumination(images: Iterable[NDArray[np.uint16]]) -> Floats:
    """Estimate an illumination function from many fields of one plate and channel.

    The mean image, smoothed by a Gaussian of one eighth of the side: the "average, then smooth" estimate of CellProfiler's
    CorrectIlluminationCalculate and of DeepProfiler, with a width that no cell survives.

    Parameters
    ----------
    images
        (H, W) uint16 each, all of one shape, at least one.

    Returns
    -------
    ndarray
        (H, W) float32, positive, mean 1.
    """
    total: NDArray[np.float64] | None = None
    for image in images:
        total = image.astype(np.float64) if total is None else total + image
    if total is None:
        raise ValueError("an illumination estimate needs at least one image")
    height, width = total.shape
    ratio = min(1.0, _SMOOTHING_SIDE / max(height, width))
    small = resize(total.astype(np.float32), tile_shape((height, width), ratio))
    smooth = ndimage.gaussian_filter(small, sigma=[SMOOTHING_SHARE * side for side in small.shape], mode="nearest")
    function = np.maximum(resize(smooth, (height, width)), np.finfo(np.float32).tiny)
    return np.asarray(function / function.mean(dtype=np.float64), dtype=np.float32)


def reduction(ingest: Ingest, raw_um: float | None) -> float:
    """Factor from raw image to tile, the option for one physical pixel size included.

    Parameters
    ----------
    ingest
        The settings.
    raw_um
        Size of a raw pixel (µm); None where it is not known.
    """
    if ingest.pixel_size_um is None or raw_um is None:
        return ingest.scale
    return raw_um / ingest.pixel_size_um


def tile_shape(shape: Sequence[int], factor: float) -> tuple[int, int]:
    """Height and width (px) of a tile, at least one pixel each."""
    return max(1, round(shape[0] * factor)), max(1, round(shape[1] * factor))


def resize(image: Floats, shape: tuple[int, int]) -> Floats:
    """Resize with a triangle filter that widens with the reduction, so that it anti-aliases (Pillow's BILINEAR).

    Parameters
    ----------
    image
        (H, W) float32.
    shape
        New height and width (px).

    Returns
    -------
    ndarray
        `shape` float32.
    """
    if image.shape == shape:
        return image
    resized = Image.fromarray(image).resize((shape[1], shape[0]), Image.Resampling.BILINEAR)
    return np.asarray(resized, dtype=np.float32)


def correct(image: NDArray[np.uint16], illumination: Floats, shape: tuple[int, int]) -> Floats:
    """Divide by the illumination function and resize.

    Parameters
    ----------
    image
        (H, W) raw intensities.
    illumination
        Positive function; resized where it differs from the image in size but not in aspect ratio.
    shape
        Height and width of the tile (px).

    Returns
    -------
    ndarray
        `shape` float32, in raw units.

    Raises
    ------
    BadImageError
        When image and illumination function differ in aspect ratio.
    """
    if illumination.shape != image.shape:
        height, width = image.shape
        aspect = illumination.shape[0] * width / (illumination.shape[1] * height)
        if abs(aspect - 1) > _ASPECT_TOLERANCE:
            raise BadImageError(f"illumination function is {_size(illumination.shape)} px, the image {_size(image.shape)}")
        illumination = resize(illumination, (height, width))
    return resize(np.divide(image, illumination, dtype=np.float32), shape)


def stretch(image: Floats, clip_percentiles: tuple[float, float], cap: float) -> NDArray[np.uint8]:
    """Clip to percentiles of the image, the upper one capped by the plate's, and stretch to 8 bits.

    Parameters
    ----------
    image
        (H, W) corrected intensities.
    clip_percentiles
        What becomes 0 and 255 (%).
    cap
        Upper bound of the plate.

    Returns
    -------
    ndarray
        (H, W) uint8.

    Raises
    ------
    BadImageError
        When nothing lies between the bounds.
    """
    low, high = np.percentile(image, clip_percentiles)
    high = min(high, cap)
    if not low < high:
        raise BadImageError("no contrast between the clipping percentiles")
    scaled = (image - np.float32(low)) * np.float32(255 / (high - low))
    return np.asarray(np.rint(np.clip(scaled, 0, 255)), dtype=np.uint8)


def _size(shape: Sequence[int]) -> str:
    """Height x width."""
    return "x".join(map(str, shape))
