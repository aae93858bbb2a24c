"""Drift: how far the DMSO images of a plate lie from those of plates that are known, in features of one extractor.

A plate's DMSO images are described by the mean and standard deviation of each feature. The distance of two such descriptions is
the 2-Wasserstein distance of normal distributions with diagonal covariance (Dowson & Landau, J. Multivar. Anal. 1982), per
feature, in standard deviations of the source: 1 means that the controls are shifted, or spread, by as much as the source's images
differ. What two samples of the same images would differ by is subtracted, so that few images make it no larger.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# A plate is unusual when it is so many times further than the furthest of the source's own plates from its others.
BEYOND_THE_ORDINARY = 1.5
# No model minds less (standard deviations), however alike the plates of the source are.
LEAST_THRESHOLD = 0.1
# Whose spread can be told.
LEAST_IMAGES = 2


@dataclass(frozen=True)
class Controls:
    """What the DMSO images of some plates are like.

    Parameters
    ----------
    mean, std
        (D,) float64, of each feature over the images.
    images
        How many.
    """

    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    images: int

    @property
    def noise(self) -> NDArray[np.float64]:
        """(D,) Variance of mean and standard deviation over samples of so many images: σ²/n, and σ²/2(n - 1) of a normal one."""
        return self.std**2 * (1 / self.images + 0.5 / (self.images - 1))

    @classmethod
    def of(cls, features: NDArray[np.floating]) -> "Controls":
        """Describe (N, D) features of N images.

        Raises
        ------
        ValueError
            When there are fewer than `LEAST_IMAGES`, or a feature of one is no finite number.
        """
        if len(features) < LEAST_IMAGES:
            raise ValueError(f"{len(features)} DMSO image(s), of which nothing can be said; {LEAST_IMAGES} or more are needed")
        values = np.asarray(features, np.float64)
        if not np.isfinite(values).all():
            broken = int((~np.isfinite(values)).any(1).sum())
            told = f"{broken} of {len(values)} DMSO images have features that are no finite numbers"
            raise ValueError(f"{told}; look at their tiles, or use another model")
        return cls(values.mean(0), values.std(0, ddof=1), len(values))


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
    def of(cls, plates: Sequence[NDArray[np.floating]]) -> "Reference | None":
        """Describe the source by the (N, D) features of the DMSO images of each of its plates; None where none has any.

        Raises
        ------
        ValueError
            When a feature is no finite number.
        """
        known = [plate for plate in plates if len(plate) >= LEAST_IMAGES]
        if not known:
            return None
        source = cls(Controls.of(np.concatenate(known)), ())
        if len(known) == 1:
            return source
        others = [Controls.of(np.concatenate(known[:i] + known[i + 1 :])) for i in range(len(known))]
        between = (source.distance(Controls.of(plate), rest) for plate, rest in zip(known, others, strict=True))
        return cls(source.source, tuple(between))

    @property
    def threshold(self) -> float | None:
        """Distance from the source that none of its own plates comes near; None where it has one plate."""
        return max(LEAST_THRESHOLD, BEYOND_THE_ORDINARY * max(self.between)) if self.between else None

    def distance(self, one: Controls, other: Controls) -> float:
        """Distance of two descriptions, in standard deviations of the source; 0 where chance alone explains more.

        Features that do not vary on the source are left out.
        """
        return float(np.sqrt(max(0.0, self._square(one, other))))

    def nearest(self, plate: Controls, known: Sequence[Controls]) -> tuple[int, list[float]]:
        """Find which of some descriptions a plate is least distant from, and how far each is; chance makes no tie of them."""
        number = int(np.argmin([self._square(plate, one) for one in known]))
        return number, [self.distance(plate, one) for one in known]

    def drift(self, plate: Controls) -> float:
        """Distance of a plate from the source."""
        return self.distance(plate, self.source)

    def _square(self, one: Controls, other: Controls) -> float:
        """Square of a distance, which chance can make negative."""
        varies = self.source.std > 0
        square = (one.mean - other.mean) ** 2 + (one.std - other.std) ** 2 - one.noise - other.noise
        return float(np.mean(square[varies] / self.source.std[varies] ** 2))
