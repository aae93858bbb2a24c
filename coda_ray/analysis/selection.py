"""Criteria that choose among adapted models without a MoA label of the target, and which way each is better.

No criterion is sure to follow the accuracy: compare models on the same tiles only, and look at several criteria.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import entr
from scipy.stats import ConstantInputWarning, spearmanr

Direction = Literal["higher", "lower"]
CRITERIA: Mapping[str, Direction] = {
    # `retrieval.replicate_map` (Kalinin et al., Nature Communications 2025): 1 where every replicate comes first.
    "replicate_map": "higher",
    "replicate_map_controls": "higher",
    # `mixing.batch_mixing` (Luecken et al., Nature Methods 2022): 1 where batches are mixed; features without content mix too.
    "ilisi": "higher",
    "kbet": "higher",
    "silhouette_batch": "higher",
    # Garrido et al., ICML 2023: the rank bounds what a linear classifier can tell apart; for runs of one method.
    "rank_me": "higher",
    # Morerio et al., ICLR 2018, choose by the entropy of predictions on the target; a model that always says the same has none.
    "mean_entropy": "lower",
    # Krause et al., NIPS 2010; Liang et al., ICML 2020 (SHOT): certain of each image, and of different classes over all images.
    "mutual_information": "higher",
    # What adaptation minimises (DINO, Caron et al., ICCV 2021; MAE, He et al., CVPR 2022). Garrido et al. find that the loss of
    # joint embeddings says little across settings: a collapsed model has a low one.
    "held_out_loss": "lower",
    # The frozen classifier reads features of before adaptation (CODA, section 3). 1 where nothing was adapted, so it can warn of
    # models that lost what the classifier knows, but not choose by itself.
    "cka_to_source": "higher",
}
# They compare wells or images of different batches, so they need two.
ACROSS_BATCHES = ("replicate_map", "replicate_map_controls", "ilisi", "kbet", "silhouette_batch")


def rank_me(features: NDArray[np.floating[Any]]) -> float:
    """Measure in how many directions features spread: exp of the entropy of their singular values, scaled to sum to 1.

    RankMe (Garrido et al., "RankMe: assessing the downstream performance of pretrained self-supervised representations by their
    rank", ICML 2023, equation 1, there with 1e-7 added to each share against log 0). Features are not centred, as there; the
    scale changes nothing.

    Parameters
    ----------
    features
        (N, D) embeddings. N well above D, and the same tiles for all models that are compared.

    Returns
    -------
    float
        From 1, all features on one line, to min(N, D).

    Raises
    ------
    ValueError
        When the shape is wrong, there is no row, a feature is not finite, or all are zero.
    """
    rows = _finite("features", features)
    values = np.linalg.svd(rows, compute_uv=False)
    if not values.any():
        raise ValueError(f"all {len(rows)} features are zero; they have no rank")
    return float(np.exp(entr(values / values.sum()).sum()))


def mean_entropy(probabilities: NDArray[np.floating[Any]]) -> float:
    """Average the entropy of predictions over images: how unsure a classifier is.

    Morerio et al., "Minimal-entropy correlation alignment for unsupervised deep domain adaptation", ICLR 2018, choose the weight
    of their adaptation by it.

    Parameters
    ----------
    probabilities
        (N, K) softmax outputs.

    Returns
    -------
    float
        Nats, from 0 to ln K.

    Raises
    ------
    ValueError
        When the shape is wrong, there is no row, or a value is negative or not finite.
    """
    return float(entr(_distributions(probabilities)).sum(axis=1).mean())


def mutual_information(probabilities: NDArray[np.floating[Any]]) -> float:
    """Estimate the mutual information of image and prediction: entropy of the mean prediction less the mean entropy.

    Krause, Perona and Gomes, "Discriminative clustering by regularized information maximization", NIPS 2010, section 2; the
    information maximisation of SHOT (Liang et al., ICML 2020, section 3.2).

    Parameters
    ----------
    probabilities
        (N, K) softmax outputs.

    Returns
    -------
    float
        Nats, from 0, where all images get the same prediction, to ln K.

    Raises
    ------
    ValueError
        As `mean_entropy`.
    """
    rows = _distributions(probabilities)
    return float(entr(rows.mean(axis=0)).sum()) - mean_entropy(rows)


@dataclass(frozen=True)
class Agreement:
    """How well a criterion chooses among models, told by an oracle.

    Parameters
    ----------
    rank_correlation
        Spearman's, from -1 to 1; above 0 where models that the criterion prefers are better. NaN where either is constant.
    chosen
        The oracle's score of the model that the criterion likes best; the mean over models that it likes alike.
    regret
        How much better the best model is; in the oracle's unit.
    models
        Number of models that have both.
    """

    rank_correlation: float
    chosen: float
    regret: float
    models: int


def agreement(criterion: NDArray[np.floating[Any]], oracle: NDArray[np.floating[Any]], direction: Direction) -> Agreement:
    """Compare a criterion with an oracle over the models of one transfer. Reads labels through the oracle: for research.

    As model selection without labels is judged by Musgrave et al., "Benchmarking validation methods for unsupervised domain
    adaptation", 2022 (arXiv 2208.07360): rank correlation with the target's accuracy.

    Parameters
    ----------
    criterion
        (N,) values; NaN where a model has none: it cannot be chosen.
    oracle
        (N,) scores that are better when higher; the best of all models counts, also of those without a criterion.
    direction
        Which way the criterion is better.

    Raises
    ------
    ValueError
        When shapes differ, an oracle is not finite, or no model has a criterion.
    """
    if criterion.shape != oracle.shape or criterion.ndim != 1:
        raise ValueError(f"criterion {criterion.shape} and oracle {oracle.shape} must be (N,) of the same N")
    if not np.isfinite(oracle).all():
        raise ValueError("an oracle's score is not finite; leave out models that were not scored")
    known = np.isfinite(criterion)
    if not known.any():
        raise ValueError("the criterion has no finite value; it cannot choose")
    liked, scored = criterion[known] * (1 if direction == "higher" else -1), oracle[known]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        correlation = spearmanr(liked, scored).statistic if len(liked) > 1 else np.nan
    chosen = float(scored[liked == liked.max()].mean())
    return Agreement(float(correlation), chosen, float(oracle.max()) - chosen, int(known.sum()))


def _distributions(probabilities: NDArray[Any]) -> NDArray[np.float64]:
    """Probabilities as (N, K) float64 that sum to 1 in each row."""
    rows = _finite("probabilities", probabilities)
    if rows.min() < 0 or not rows.sum(axis=1).all():
        raise ValueError(f"probabilities span [{rows.min()}, {rows.max()}], or a row of them is zero; give softmax outputs")
    # Single precision leaves their sum a little off.
    shares: NDArray[np.float64] = rows / rows.sum(axis=1, keepdims=True)
    return shares


def _finite(name: str, values: NDArray[Any]) -> NDArray[np.float64]:
    """Rows as (N, D) float64."""
    rows: NDArray[np.float64] = np.asarray(values, dtype=np.float64)
    if rows.ndim != 2 or not rows.size:
        raise ValueError(f"{name} {rows.shape} must be (N, D), with a row or more")
    if not np.isfinite(rows).all():
        raise ValueError(f"{name} hold values that are not finite; the model that gave them has diverged")
    return rows
