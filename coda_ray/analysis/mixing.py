"""How well batches mix in feature space, by the metrics of single-cell integration benchmarks.

Luecken et al., "Benchmarking atlas-level data integration in single-cell genomics", Nature Methods 2022, as scib-metrics has
them; Arevalo et al., Nature Communications 2024, use the same for batch correction of Cell Painting profiles.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors

# scib-metrics' number for LISI; its perplexity is a third of it.
NEIGHBOURS = 90
# Of a kBET test, as Luecken et al. choose: a quarter of the mean batch, within these bounds.
KBET_NEIGHBOURS = (10, 70)
# Three of the smallest neighbourhoods: with fewer, every test would see nearly all images of the label.
KBET_IMAGES = 30


def batch_mixing(features: NDArray[np.floating[Any]], batches: NDArray[Any], labels: NDArray[Any]) -> dict[str, float]:
    """Score the mixing of batches, from 0 (apart) to 1 (mixed).

    Parameters
    ----------
    features
        (N, D) embeddings; distances are Euclidean, so scale them first.
    batches
        (N,) strings or integers.
    labels
        (N,) compounds or mechanisms, strings or integers. Images of one label should look alike in all batches; kBET and the
        silhouette compare batches within a label only, and leave out labels in one batch or with fewer than 30 images.

    Returns
    -------
    dict
        `ilisi`: median over images of the inverse Simpson index of batches among the 90 nearest images (LISI, Korsunsky et
        al., Nature Methods 2019), scaled from [1, number of batches]; random neighbours reach about 0.85 with three batches
        and 0.65 with eight, less with unequal ones, so compare the same images only. `kbet`: share of images whose
        neighbours have the same mix of batches as their label, by a χ² test at 5 % (Büttner et al., Nature Methods 2019),
        mean over labels. `silhouette_batch`: 1 - |silhouette width of the batches|, mean over labels (ASW, Luecken et al.);
        a batch that overlaps with one other scores high though the rest lie apart (Rautenstrauch and Ohler, Nature
        Biotechnology 2025).

    Raises
    ------
    ValueError
        When shapes disagree, a feature is not finite, there is one batch only, or no label can be compared.
    """
    rows = _check(features, batches, labels)
    batch = np.unique(batches, return_inverse=True)[1]
    label = np.unique(labels, return_inverse=True)[1]
    inside = [label == name for name in range(label.max() + 1)]
    comparable = [mask for mask in inside if mask.sum() >= KBET_IMAGES and 1 < len(np.unique(batch[mask])) < mask.sum()]
    if not comparable:
        raise ValueError(
            f"none of the {len(inside)} labels has {KBET_IMAGES} images in several batches; "
            "give image features, with compounds or mechanisms that several batches share"
        )
    # Its import compiles umap and jax code for many seconds.
    from scib_metrics import ilisi_knn, kbet, silhouette_batch

    accepted = []
    for mask in comparable:
        images_per_batch = mask.sum() / len(np.unique(batch[mask]))
        count = int(np.clip(images_per_batch // 4, *KBET_NEIGHBOURS))
        accepted.append(kbet(_neighbours(rows[mask], count), batch[mask])[0])
    kept = np.any(comparable, axis=0)
    scores = {
        "ilisi": ilisi_knn(_neighbours(rows, min(NEIGHBOURS, len(rows) - 1)), batch),
        "kbet": np.mean(accepted),
        "silhouette_batch": silhouette_batch(rows[kept], label[kept], batch[kept]),
    }
    return {name: float(value) for name, value in scores.items()}


def _neighbours(rows: NDArray[np.float32], count: int) -> Any:
    """The image itself and its nearest others, as scib-metrics takes them; exact."""
    from scib_metrics.nearest_neighbors import NeighborsResults

    # By a matrix product; scib-metrics' own exact search forms every difference of two rows.
    distances, indices = NearestNeighbors(n_neighbors=count + 1, algorithm="brute").fit(rows).kneighbors(rows)
    return NeighborsResults(indices=indices, distances=distances)


def _check(features: NDArray[Any], batches: NDArray[Any], labels: NDArray[Any]) -> NDArray[np.float32]:
    """Features as (N, D) float32, of several batches."""
    rows: NDArray[np.float32] = np.asarray(features, dtype=np.float32)
    if rows.ndim != 2 or not rows.size or np.shape(batches) != (len(rows),) or np.shape(labels) != (len(rows),):
        raise ValueError(
            f"features {rows.shape}, batches {np.shape(batches)} and labels {np.shape(labels)} must be (N, D), (N,) and (N,)"
        )
    if not np.isfinite(rows).all():
        raise ValueError("features hold values that are not finite; the model that gave them has diverged")
    if len(np.unique(batches)) < 2:
        raise ValueError(f"all features are of batch {np.asarray(batches)[0]}; mixing needs two batches or more")
    return rows
