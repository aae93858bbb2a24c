"""The weighted k-nearest-neighbour monitor of self-supervised training."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

QUERIES_AT_A_TIME = 1024


def knn_accuracy(
    bank: NDArray[np.floating[Any]],
    bank_labels: NDArray[np.integer[Any]],
    queries: NDArray[np.floating[Any]],
    labels: NDArray[np.integer[Any]],
    k: int = 50,
    temperature: float = 0.1,
) -> float:
    """Classify queries by their k nearest neighbours, weighted by exp(cosine / temperature).

    The protocol of Wu et al. (CVPR 2018, section 3.4), as DINO (Caron et al. 2021) uses it.

    Parameters
    ----------
    bank
        (M, D) embeddings with known labels; not normalised.
    bank_labels
        (M,) non-negative integers.
    queries
        (N, D) embeddings to classify; not normalised.
    labels
        (N,) integers.
    k
        Neighbours that vote; all of the bank where it has fewer.
    temperature
        Divides the cosine.

    Returns
    -------
    float
        Share of queries whose class is right. Equal votes go to the smaller class number.

    Raises
    ------
    ValueError
        When the bank or the queries are empty, or shapes disagree.
    """
    bank, queries = _unit_length(bank), _unit_length(queries)
    bank_labels, labels = np.asarray(bank_labels), np.asarray(labels)
    if not len(bank) or not len(queries):
        raise ValueError(f"k-NN needs a bank and queries; it has {len(bank)} and {len(queries)}")
    if len(bank) != len(bank_labels) or len(queries) != len(labels) or bank.shape[1] != queries.shape[1]:
        raise ValueError(
            f"bank {bank.shape} with {len(bank_labels)} labels and queries {queries.shape} with {len(labels)}: "
            "must be (M, D) with M and (N, D) with N"
        )
    k, right = min(k, len(bank)), 0
    for start in range(0, len(queries), QUERIES_AT_A_TIME):
        rows = slice(start, start + QUERIES_AT_A_TIME)
        cosine = queries[rows] @ bank.T
        nearest = np.argpartition(cosine, len(bank) - k, axis=1)[:, len(bank) - k :]
        # The constant -1 changes no vote and keeps exp() finite at low temperatures.
        weight = np.exp((np.take_along_axis(cosine, nearest, axis=1) - 1.0) / temperature)
        votes = np.zeros((len(cosine), int(bank_labels.max()) + 1))
        np.add.at(votes, (np.arange(len(cosine))[:, None], bank_labels[nearest]), weight)
        right += int((votes.argmax(axis=1) == labels[rows]).sum())
    return right / len(queries)


def _unit_length(embeddings: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """L2-normalise rows; a zero row stays zero."""
    rows: NDArray[np.float32] = np.asarray(embeddings, dtype=np.float32)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: NDArray[np.float32] = rows / np.maximum(length, np.float32(1e-12))
    return unit
