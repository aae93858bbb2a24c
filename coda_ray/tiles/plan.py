"""The seeded sample plan: which tiles sample i of a run is made of.

Sample i is a pure function of (seed, i). So the order is a true global shuffle, a run resumes at any sample, and the
number of workers changes nothing.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from coda_ray.draws import uniforms

PARTNER_STREAM = 1
REPLACEMENT_STREAM = 2
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Partners:
    """Where the cross-batch partners of every tile are (CBCL, CODA section 3).

    Tiles are sorted by (compound, batch): a tile's candidates are its compound's range without its own batch's range, so
    that drawing one takes constant time.

    Parameters
    ----------
    order
        (N,) rows sorted by (compound, batch).
    start, own_start, own_end, end
        (N,) bounds in `order`, per row: of its compound, and of its own batch within it.
    """

    order: Rows
    start: Rows
    own_start: Rows
    own_end: Rows
    end: Rows

    @classmethod
    def build(cls, compounds: Rows, batches: Rows) -> "Partners":
        """Index tiles by compound and batch.

        Parameters
        ----------
        compounds, batches
            (N,) integer codes; compound -1 is unknown and has no partner.
        """
        n = len(compounds)
        order = np.lexsort((batches, compounds)).astype(np.int64)
        compound, batch = compounds[order], batches[order]
        first = np.r_[True, compound[1:] != compound[:-1]] if n else np.zeros(0, bool)
        first_own = first | np.r_[True, batch[1:] != batch[:-1]] if n else first
        bounds = np.empty((4, n), np.int64)
        for (low, high), starts in zip(((0, 3), (1, 2)), (first, first_own), strict=True):
            begins = np.flatnonzero(starts)
            group = np.cumsum(starts) - 1
            bounds[low, order] = begins[group]
            bounds[high, order] = np.r_[begins[1:], n][group]
        start, own_start, own_end, end = bounds
        unknown = compounds < 0
        end = np.where(unknown, start, end)
        own_start, own_end = np.where(unknown, start, own_start), np.where(unknown, start, own_end)
        return cls(order, start, own_start, own_end, end)

    def count(self, rows: Rows) -> Rows:
        """Number of candidate partners of each row."""
        return (self.end - self.start - (self.own_end - self.own_start))[rows]

    def draw(self, rows: Rows, u: NDArray[np.float64]) -> Rows:
        """Draw one partner per row.

        Parameters
        ----------
        rows
            (M,) rows of the anchors.
        u
            (M,) uniform numbers in [0, 1).

        Returns
        -------
        ndarray
            (M,) int64 rows; an anchor without a candidate is its own partner.
        """
        count = self.count(rows)
        position = self.start[rows] + np.floor(u * count).astype(np.int64)
        skip = position >= self.own_start[rows]
        position = np.where(skip, position + (self.own_end - self.own_start)[rows], position)
        return np.where(count > 0, self.order[np.minimum(position, len(self.order) - 1)], rows)


@dataclass(frozen=True)
class SamplePlan:
    """The tiles of every sample of a run.

    Parameters
    ----------
    seed
        Seed of the run.
    anchors
        (A,) int64 rows that samples are drawn from: each once per epoch, in an order of the epoch's own.
    partners
        Adds a cross-batch partner to each sample.
    shuffle
        False keeps the order of `anchors` (evaluation).
    """

    seed: int
    anchors: Rows
    partners: Partners | None = None
    shuffle: bool = True

    def rows(self, samples: Rows) -> tuple[Rows, Rows | None]:
        """Find the tiles of some samples.

        Parameters
        ----------
        samples
            (M,) int64 sample numbers.

        Returns
        -------
        tuple
            Anchor rows (M,), and partner rows (M,) or None.
        """
        epochs, places = np.divmod(samples, len(self.anchors))
        anchors = np.empty(len(samples), np.int64)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            anchors[inside] = self.anchors[self._order(int(epoch))[places[inside]]]
        if self.partners is None:
            return anchors, None
        return anchors, self.partners.draw(anchors, uniforms(self.seed, samples, 1, PARTNER_STREAM)[:, 0])

    def replacement(self, samples: Rows, attempt: int) -> tuple[Rows, Rows | None]:
        """Find other tiles for samples whose own cannot be read; `attempt` counts from 0."""
        u = uniforms(self.seed, samples, 2, REPLACEMENT_STREAM + attempt)
        anchors = self.anchors[np.floor(u[:, 0] * len(self.anchors)).astype(np.int64)]
        return anchors, None if self.partners is None else self.partners.draw(anchors, u[:, 1])

    def _order(self, epoch: int) -> Rows:
        """Order of the anchors in one epoch."""
        if not self.shuffle:
            return np.arange(len(self.anchors))
        return _permutation(self.seed, epoch, len(self.anchors))


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, n: int) -> Rows:
    """A seeded shuffle; a task asks for the same epoch again and again."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def share_of(rank: int, world: int, minibatch: int) -> tuple[int, int]:
    """Bounds of one worker's samples within each mini-batch.

    Returns
    -------
    tuple
        First and one past the last place; shares differ by one at the most.
    """
    return rank * minibatch // world, (rank + 1) * minibatch // world
