"""Centred kernel alignment between the layers of two networks, or of one network before and after adaptation."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# The unbiased estimator divides by n (n - 3).
MIN_IMAGES = 4


class MinibatchCka:
    """Linear CKA of every layer of a with every layer of b, gathered over mini-batches.

    CKA is HSIC(K, L) / √(HSIC(K, K) HSIC(L, L)) of the Gram matrices of two layers (Kornblith et al., "Similarity of neural
    network representations revisited", ICML 2019, section 3). Each HSIC is the mean over mini-batches of its unbiased
    estimate (HSIC₁ of Song et al., "Feature selection via dependence maximization", JMLR 2012): it does not depend on the
    size of the mini-batches, and no Gram matrix of all images is needed (Nguyen et al., "Do wide and deep networks learn the
    same things?", ICLR 2021). The estimate is the inner product of U-centred Gram matrices (Székely and Rizzo, "Partial
    distance correlation with methods for dissimilarities", Annals of Statistics 2014, definition 2); computed so, the work of
    a layer is done once and not for every pair.
    """

    def __init__(self) -> None:
        self._between: list[NDArray[np.float64]] = []
        self._within_a: list[NDArray[np.float64]] = []
        self._within_b: list[NDArray[np.float64]] = []

    def update(self, features_a: Sequence[NDArray[np.floating[Any]]], features_b: Sequence[NDArray[np.floating[Any]]]) -> None:
        """Add one mini-batch; each counts alike, so give all the same number of images.

        Parameters
        ----------
        features_a
            One array (B, D) per layer of a, of one token or of all tokens side by side; D may differ by layer.
        features_b
            The same of b, for the same images in the same order.

        Raises
        ------
        ValueError
            When shapes disagree, a feature is not finite, there are fewer than 4 images, or the number of layers changes.
        """
        a, b = _u_centred("a", features_a), _u_centred("b", features_b)
        if a.shape[1] != b.shape[1]:
            raise ValueError(f"a has {len(features_a[0])} images and b {len(features_b[0])}; give both the same mini-batch")
        between = a @ b.T
        if self._between and between.shape != self._between[0].shape:
            raise ValueError(
                f"(layers of a, of b) are {between.shape}, were {self._between[0].shape}; gather each pair by itself"
            )
        self._between.append(between)
        self._within_a.append((a * a).sum(axis=1))
        self._within_b.append((b * b).sum(axis=1))

    def matrix(self) -> NDArray[np.float64]:
        """CKA so far.

        Returns
        -------
        ndarray
            (layers of a, layers of b); 1: alike up to rotation and scale; about 0: unrelated, where the unbiased estimate may
            fall a little below.

        Raises
        ------
        ValueError
            When there was no mini-batch, or a layer gives all images the same features.
        """
        if not self._between:
            raise ValueError("CKA has seen no mini-batch; call update first")
        within_a, within_b = np.mean(self._within_a, axis=0), np.mean(self._within_b, axis=0)
        for name, within in (("a", within_a), ("b", within_b)):
            if not within.all():
                raise ValueError(f"layer {within.argmin()} of {name} gives all images the same features; it has no CKA")
        aligned: NDArray[np.float64] = np.mean(self._between, axis=0) / np.sqrt(np.outer(within_a, within_b))
        return aligned


def _u_centred(name: str, layers: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
    """U-centred linear Gram matrices, flattened and scaled so that inner products are unbiased HSIC: (layers, B²)."""
    arrays = [np.asarray(layer, dtype=np.float64) for layer in layers]
    shapes = [array.shape for array in arrays]
    if not arrays or any(len(shape) != 2 or shape[0] != shapes[0][0] for shape in shapes):
        raise ValueError(f"features of {name} have shapes {shapes}; give one (B, D) per layer, with the same B")
    count = shapes[0][0]
    if count < MIN_IMAGES:
        raise ValueError(f"the mini-batch of {name} has {count} images; unbiased HSIC needs {MIN_IMAGES} or more")
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError(f"features of {name} hold values that are not finite; the model that gave them has diverged")
    # U-centring undoes any shift of the features; without a common offset, rounding stays small and equal images give 0.
    gram: NDArray[np.float64] = np.stack([shifted @ shifted.T for shifted in (array - array[0] for array in arrays)])
    diagonal = np.arange(count)
    gram[:, diagonal, diagonal] = 0.0
    sums = gram.sum(axis=2)
    gram -= (sums[:, :, None] + sums[:, None, :]) / (count - 2)
    gram += sums.sum(axis=1)[:, None, None] / ((count - 1) * (count - 2))
    gram[:, diagonal, diagonal] = 0.0
    flat: NDArray[np.float64] = gram.reshape(len(arrays), -1) / np.sqrt(count * (count - 3))
    return flat
