"""Scores of a classifier, per image, per well and per compound."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, f1_score


def image_scores(labels: NDArray[np.integer[Any]], probabilities: NDArray[np.floating[Any]]) -> dict[str, float]:
    """Score every image by its most probable class.

    Parameters
    ----------
    labels
        (N,) integers in [0, K).
    probabilities
        (N, K) softmax outputs.

    Returns
    -------
    dict
        `accuracy`, and `macro_f1`: the mean F1 over the classes that are present in `labels`. A class that is
        predicted but not present has no F1 of its own; the images it took count against their own classes.

    Raises
    ------
    ValueError
        When there is no image, shapes disagree, a label lies outside [0, K) or a probability is not finite.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities)
    _check(labels, probabilities)
    predicted = probabilities.argmax(axis=1)
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "macro_f1": float(f1_score(labels, predicted, labels=np.unique(labels), average="macro", zero_division=0.0)),
    }


def well_scores(
    wells: NDArray[Any], labels: NDArray[np.integer[Any]], probabilities: NDArray[np.floating[Any]]
) -> dict[str, float]:
    """Score every well by the mean of its images' softmax outputs.

    Parameters
    ----------
    wells
        (N,) strings or integers that name the well of each image across all plates, such as `plate/A01`.
    labels
        (N,) integers in [0, K), the same for all images of a well.
    probabilities
        (N, K) softmax outputs.

    Returns
    -------
    dict
        `well_accuracy` and `well_macro_f1`, as in `image_scores`.

    Raises
    ------
    ValueError
        As `image_scores`, and when a well has more than one label.
    """
    return _group_scores("well", wells, labels, probabilities, "name wells by plate and position")


def compound_scores(
    compounds: NDArray[Any], labels: NDArray[np.integer[Any]], probabilities: NDArray[np.floating[Any]]
) -> dict[str, float]:
    """Score every compound by the mean of its images' softmax outputs, over all its wells and plates.

    Parameters
    ----------
    compounds
        (N,) strings or integers that name the compound of each image.
    labels
        (N,) integers in [0, K), the same for all images of a compound.
    probabilities
        (N, K) softmax outputs.

    Returns
    -------
    dict
        `compound_accuracy` and `compound_macro_f1`, as in `image_scores`.

    Raises
    ------
    ValueError
        As `image_scores`, and when a compound has more than one label.
    """
    return _group_scores("compound", compounds, labels, probabilities, "score a compound under one mechanism")


def _group_scores(
    kind: str, groups: NDArray[Any], labels: NDArray[Any], probabilities: NDArray[Any], remedy: str
) -> dict[str, float]:
    """Score groups of images by their mean softmax; the names of the scores start with the kind of group."""
    groups, labels, probabilities = np.asarray(groups), np.asarray(labels), np.asarray(probabilities)
    _check(labels, probabilities)
    if groups.shape != labels.shape:
        raise ValueError(f"{kind}s has shape {groups.shape}, labels {labels.shape}; give one {kind} per image")
    names, first, code = np.unique(groups, return_index=True, return_inverse=True)
    of_group = labels[first]
    mixed = np.flatnonzero(of_group[code] != labels)
    if len(mixed):
        raise ValueError(f"{kind} {names[code[mixed[0]]]} has several labels; {remedy}")
    sums = np.zeros((len(names), probabilities.shape[1]))
    np.add.at(sums, code, probabilities.astype(np.float64))
    scores = image_scores(of_group, sums / np.bincount(code)[:, None])
    return {f"{kind}_{name}": value for name, value in scores.items()}


def _check(labels: NDArray[Any], probabilities: NDArray[Any]) -> None:
    """Refuse arrays that cannot be scored."""
    if labels.ndim != 1 or probabilities.ndim != 2 or len(labels) != len(probabilities):
        raise ValueError(f"labels {labels.shape} and probabilities {probabilities.shape} must be (N,) and (N, K)")
    if not len(labels):
        raise ValueError("there is no image to score; check the labels and the selection of tiles")
    if labels.min() < 0 or labels.max() >= probabilities.shape[1]:
        raise ValueError(f"labels span [{labels.min()}, {labels.max()}] for {probabilities.shape[1]} classes")
    if not np.isfinite(probabilities).all():
        raise ValueError("probabilities hold values that are not finite; the model that gave them has diverged")
