"""Drift: how far the DMSO images of a plate lie from those of plates that are known, in features of one extractor.

A plate's DMSO images are described by the mean and standard deviation of each feature. The distance of two such descriptions is
the 2-Wasserstein distance of normal distributions with diagonal covariance (Dowson & Landau, J. Multivar. Anal. 1982), per
feature, in standard deviations of the source: 1 means that the controls are shifted, or spread, by as much as the source's images
differ.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# A plate is unusual when it is so many times further than the furthest of the source's own plates from its others.
BEYOND_THE_ORDINARY = 1.5


@dataclass(frozen=True)
class Controls:
    """What the DMSO images of some plates are like.

    Parameters
    ----------
    mean, std
        (D,) float64, of each feature over the images.
    """

    mean: NDArray[np.float64]
    std: NDArray[np.float64]

    @classmethod
    def of(cls, features: NDArray[np.floating]) -> "Controls":
        """Describe (N, D) features of N images.

        Raises
        ------
        ValueError
            When there is no image.
        """
        if not len(features):
            raise ValueError("no DMSO image to describe")
        values = np.asarray(features, np.float64)
        return cls(values.mean(0), values.std(0))


@dataclass(frozen=True)
class Reference:
    """What plates are compared with.

    Parameters
    ----------
    source
        All DMSO images of the source.
    between
        Distance of each of the source's plates from its others; empty where it has one plate.
    """

    source: Controls
    between: tuple[float, ...]

    @classmethod
    def of(cls, plates: Sequence[NDArray[np.floating]]) -> "Reference":
        """Describe the source by the (N, D) features of the DMSO images of each of its plates.

        Raises
        ------
        ValueError
            When no plate has a DMSO image.
        """
        known = [plate for plate in plates if len(plate)]
        if not known:
            raise ValueError("the source has no DMSO image (Metadata_Control = negcon); drift is measured from them")
        source = cls(Controls.of(np.concatenate(known)), ())
        if len(known) == 1:
            return source
        others = [Controls.of(np.concatenate(known[:i] + known[i + 1 :])) for i in range(len(known))]
        between = (source.distance(Controls.of(plate), rest) for plate, rest in zip(known, others, strict=True))
        return cls(source.source, tuple(between))

    @property
    def threshold(self) -> float | None:
        """Distance from the source that none of its own plates comes near; None where it has one plate."""
        return BEYOND_THE_ORDINARY * max(self.between) if self.between else None

    def distance(self, one: Controls, other: Controls) -> float:
        """Distance of two descriptions, in standard deviations of the source.

        Features that do not vary on the source are left out.
        """
        varies = self.source.std > 0
        square = (one.mean - other.mean) ** 2 + (one.std - other.std) ** 2
        return float(np.sqrt(np.mean(square[varies] / self.source.std[varies] ** 2)))

    def drift(self, plate: Controls) -> float:
        """Distance of a plate from the source."""
        return self.distance(plate, self.source)
