"""What a matrix found, gathered for its report: tables, pictures and what is still missing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

DATA_COLUMNS = ("source", "batches", "plates", "wells", "compounds", "moas", "images", "labelled", "tile_px", "pixel_size_um")
DIFFERENCE_COLUMNS = (
    "split",
    "granularity",
    "target",
    "method",
    "against",
    "difference",
    "low",
    "high",
    "n_images",
    "n_wells",
    "n_seeds",
)
POOLED = "all targets"


@dataclass(frozen=True)
class Example:
    """Some tiles of one source.

    Parameters
    ----------
    source
        Whose.
    compounds
        (N,) compound of each tile.
    channels
        Names of the up to three channels that are shown, as red, green and blue.
    raw
        (N, up to 3, S, S) uint8.
    normalised
        (N, up to 3, S, S) float32, as networks see them: zero mean, unit standard deviation per tile and channel.
    pixel_size_um
        Side of a pixel (µm); NaN where it is not known.
    """

    source: str
    compounds: tuple[str, ...]
    channels: tuple[str, ...]
    raw: NDArray[np.uint8]
    normalised: NDArray[np.float32]
    pixel_size_um: float


@dataclass(frozen=True)
class FeatureMap:
    """Embeddings in the plane before and after adaptation.

    Parameters
    ----------
    source, target, before, after
        Names of the sources and of the two methods.
    seed
        Of the models.
    frame
        One row per tile and state: `state` (before, after), `x`, `y`, `batch`, `moa` (None where not known).
    """

    source: str
    target: str
    before: str
    after: str
    seed: int
    frame: pd.DataFrame


@dataclass(frozen=True)
class LayerComparison:
    """How alike two feature extractors see the same tiles.

    Parameters
    ----------
    name
        For the file.
    title, first, second
        What is compared, for people.
    seed
        Of the models.
    cka
        Reading (`all tokens`, `CLS`) to (blocks of the first, blocks of the second) float64.
    """

    name: str
    title: str
    first: str
    second: str
    seed: int
    cka: Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Findings:
    """Everything that a report shows.

    Parameters
    ----------
    job
        The job's record: key, name, command, config, transfers, stages.
    data
        One row per source: `DATA_COLUMNS`.
    transfers
        The job's rows of `transfers.parquet`.
    matrix
        From `table.job_matrix`; empty where nothing is scored yet.
    differences
        `DIFFERENCE_COLUMNS`: accuracy of `method` minus that of `against`, shares in [-1, 1], with the 95 % interval over wells.
    examples, maps, layers
        For the pictures.
    unfinished
        Titles of the matrix's stages that are not finished.
    unscored
        Finished transfers that have no scores yet.
    remedy
        The command that finishes them.
    notes
        What is not shown, and why, one sentence each.
    """

    job: Mapping[str, Any]
    data: pd.DataFrame
    transfers: pd.DataFrame
    matrix: pd.DataFrame
    differences: pd.DataFrame
    examples: Sequence[Example]
    maps: Sequence[FeatureMap]
    layers: Sequence[LayerComparison]
    unfinished: Sequence[str]
    unscored: int
    remedy: str
    notes: Sequence[str] = field(default=())
