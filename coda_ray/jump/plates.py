"""What is measured once per plate, on a sample of its sites, before any tile is made: bounds and illumination."""

import io
import json
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from coda_ray.config import Ingest
from coda_ray.jump.layout import PlateName
from coda_ray.jump.prepare import (
    BadImageError,
    Floats,
    correct,
    estimate_illumination,
    read_illumination,
    read_image,
    tile_shape,
)
from coda_ray.storage import Folder
from coda_ray.tiles.store import TileStore

# Stands where no usable illumination function is supplied.
ESTIMATE = "estimate"
# Seed of the choice of sampled sites; with the plate's name it decides them.
_SAMPLE_SEED = 0
Image = NDArray[np.uint16]


@dataclass
class PlateFacts:
    """What the tiles of a plate have in common.

    Parameters
    ----------
    shape
        Height and width of the raw images (px), the most common ones; None where no sampled image can be read.
    caps
        Channel → upper intensity bound, in illumination-corrected raw units.
    illumination
        Channel → listed address → address that is used, or `ESTIMATE`; a row without an address is listed as "".
    sampled
        Channel → number of images that the bounds were measured on.
    notes
        What people should know.
    """

    shape: tuple[int, int] | None = None
    caps: dict[str, float] = field(default_factory=dict)
    illumination: dict[str, dict[str, str]] = field(default_factory=dict)
    sampled: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        """Write as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "PlateFacts":
        """Read back what `to_json` wrote."""
        facts = cls(**json.loads(text))
        facts.shape = None if facts.shape is None else (facts.shape[0], facts.shape[1])
        return facts


def estimate_path(plate: PlateName, channel: str) -> str:
    """Where the tile store keeps a plate's own illumination estimate."""
    return f"{TileStore.plate_path(*plate)}/illumination-{channel}.npy"


class IlluminationFunctions:
    """The illumination functions of one plate, each read once while this object lives.

    Parameters
    ----------
    bucket
        Where supplied functions are.
    store
        Where the plate's own estimates are.
    plate
        Its name.
    """

    def __init__(self, bucket: Folder, store: TileStore, plate: PlateName) -> None:
        self._bucket, self._store, self._plate = bucket, store, plate
        self._read: dict[tuple[str, str], Floats | BadImageError] = {}

    def get(self, channel: str, address: str) -> Floats:
        """Give a supplied function by its address, or the plate's estimate by `ESTIMATE`.

        Returns
        -------
        ndarray
            (H, W) float32, mean 1.

        Raises
        ------
        BadImageError
            When the file is missing or holds no usable function.
        """
        key = (channel, address)
        if key not in self._read:
            try:
                self._read[key] = read_illumination(self._bytes(channel, address))
            except FileNotFoundError:
                self._read[key] = BadImageError("illumination file is missing")
            except BadImageError as error:
                self._read[key] = error
        found = self._read[key]
        if isinstance(found, BadImageError):
            raise BadImageError(str(found))
        return found

    def write_estimate(self, channel: str, function: Floats) -> None:
        """Keep an estimate beside the plate's tiles."""
        buffer = io.BytesIO()
        np.save(buffer, function, allow_pickle=False)
        self._store.folder.write(estimate_path(self._plate, channel), buffer.getvalue())

    def _bytes(self, channel: str, address: str) -> bytes:
        """Content of the file."""
        if address == ESTIMATE:
            return self._store.folder.read(estimate_path(self._plate, channel))
        return self._bucket.read_address(address)


def measure_plate(
    sites: pd.DataFrame, plate: PlateName, bucket: Folder, store: TileStore, ingest: Ingest, factor: float
) -> PlateFacts:
    """Measure a plate on a sample of its sites.

    Illumination: the supplied function of each row; where a row has none that can be used, another supplied one of the
    plate and channel; where there is none at all, an estimate from the sample, written to the tile store. Bound: the
    `plate_percentile` of all pixels of the sample, corrected and resized.

    Parameters
    ----------
    sites
        Healthy rows of the plate with `Orig_<channel>` and `Illum_<channel>`, full addresses.
    plate
        Its name.
    bucket
        Where images and illumination functions are.
    store
        Where an estimate is written.
    ingest
        The settings.
    factor
        Reduction from raw image to tile.

    Returns
    -------
    PlateFacts
        Images that cannot be read are left out here; the tiles' own pass quarantines them.
    """
    facts = PlateFacts()
    functions = IlluminationFunctions(bucket, store, plate)
    estimated: list[str] = []
    with ThreadPoolExecutor(ingest.threads) as pool:
        for channel in ingest.channels:
            images = _sample_images(sites, plate, channel, bucket, ingest.plate_sample, pool)
            if facts.shape is None and images:
                shapes = [image.shape for image in images.values()]
                facts.shape = max(sorted(set(shapes)), key=shapes.count)
            kept = {row: image for row, image in images.items() if image.shape == facts.shape}
            facts.sampled[channel] = len(kept)
            listed = _listed(sites, channel)
            facts.illumination[channel] = _choose_illumination(listed, channel, functions, facts.notes)
            if ESTIMATE in facts.illumination[channel].values() and kept:
                functions.write_estimate(channel, estimate_illumination(kept.values()))
                estimated.append(f"{channel} from {len(kept)} sites")
            uses = {row: facts.illumination[channel][listed[row]] for row in kept}
            corrected = _corrected(kept, uses, channel, functions, factor)
            pixels = [image.ravel() for image in corrected]
            if pixels:
                facts.caps[channel] = float(np.percentile(np.concatenate(pixels), ingest.plate_percentile))
    if estimated:
        facts.notes.append(f"illumination estimated: {', '.join(estimated)}")
    return facts


def _sample_images(
    sites: pd.DataFrame, plate: PlateName, channel: str, bucket: Folder, wanted: int, pool: ThreadPoolExecutor
) -> dict[Any, Image]:
    """Read one channel of sampled sites; further sites only where none of the first can be read."""
    order = np.random.default_rng([_SAMPLE_SEED, zlib.crc32("/".join(plate).encode())]).permutation(len(sites))
    for start in range(0, len(order), wanted):
        rows = sites.index[np.sort(order[start : start + wanted])]
        read = pool.map(partial(_read_or_none, bucket), sites.loc[rows, f"Orig_{channel}"])
        images = {row: image for row, image in zip(rows, read, strict=True) if image is not None}
        if images:
            return images
    return {}


def _read_or_none(bucket: Folder, address: str) -> Image | None:
    """Read an image; None where it is missing or bad."""
    try:
        return read_image(bucket.read_address(address))
    except (BadImageError, FileNotFoundError):
        return None


def _listed(sites: pd.DataFrame, channel: str) -> "pd.Series[str]":
    """Give the listed illumination address of each row, "" where there is none."""
    column = f"Illum_{channel}"
    return sites[column].fillna("") if column in sites else pd.Series("", index=sites.index)


def _choose_illumination(
    listed: "pd.Series[str]", channel: str, functions: IlluminationFunctions, notes: list[str]
) -> dict[str, str]:
    """Decide what each listed address is replaced by."""
    usable: list[str] = []
    addresses = sorted(listed.unique())
    for address in filter(None, addresses):
        try:
            functions.get(channel, address)
            usable.append(address)
        except BadImageError as error:
            notes.append(f"{channel}: {error}: {address}")
    if "" in addresses and usable:
        notes.append(f"{channel}: rows without an illumination file take {usable[0]}")
    instead = usable[0] if usable else ESTIMATE
    return {address: address if address in usable else instead for address in addresses}


def _corrected(
    images: dict[Any, Image], uses: dict[Any, str], channel: str, functions: IlluminationFunctions, factor: float
) -> Iterator[Floats]:
    """Correct and resize the sampled images, leaving out those whose illumination function does not fit."""
    for row, image in images.items():
        try:
            yield correct(image, functions.get(channel, uses[row]), tile_shape(image.shape, factor))
        except BadImageError:
            continue
