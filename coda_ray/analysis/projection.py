"""Two-dimensional maps of features, to look at."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

# umap-learn's defaults, named so that a figure can state them.
NEIGHBOURS = 15
MIN_DISTANCE = 0.1


def project(features: NDArray[np.floating[Any]], *, seed: int) -> NDArray[np.float32]:
    """Map features to the plane by UMAP (McInnes, Healy and Melville 2018, arXiv 1802.03426).

    15 neighbours by cosine, as the k-NN monitor compares embeddings, minimal distance 0.1, spectral initialisation; one
    thread, because several give another map each time. To compare features before and after adaptation, project both
    together: maps of separate runs have no common axes. Distances between groups mean little.

    Parameters
    ----------
    features
        (N, D) embeddings.
    seed
        Of the initialisation and the optimisation; the same seed gives the same map with the same release of the library
        on the same kind of machine.

    Returns
    -------
    ndarray
        (N, 2) float32.

    Raises
    ------
    ValueError
        When the shape is wrong, there are no more than 15 rows or a feature is not finite.
    """
    rows: NDArray[np.float32] = np.asarray(features, dtype=np.float32)
    if rows.ndim != 2 or len(rows) <= NEIGHBOURS:
        raise ValueError(f"features {rows.shape} must be (N, D) with more than {NEIGHBOURS} rows")
    if not np.isfinite(rows).all():
        raise ValueError("features hold values that are not finite; the model that gave them has diverged")
    # Its import compiles code for many seconds.
    from umap import UMAP

    umap = UMAP(n_neighbors=NEIGHBOURS, min_dist=MIN_DISTANCE, metric="cosine", random_state=seed, n_jobs=1)
    places: NDArray[np.float32] = np.asarray(umap.fit_transform(rows), dtype=np.float32)
    return places
