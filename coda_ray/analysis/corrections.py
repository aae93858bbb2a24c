"""Feature corrections that need no label of the target, and a linear classifier on features: baselines of adaptation."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

# harmonypy seeks one cluster for every 30 rows, at most 100.
HARMONY_ROWS_PER_CLUSTER = 30
# Of CORAL: what is added to both covariances, of features that are scaled to variance 1.
CORAL_RIDGE = 1.0


def zscore_plates(features: NDArray[np.floating[Any]], plates: NDArray[Any], reference: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Bring each plate's features to mean 0 and standard deviation 1 of its reference images.

    The plate-wise normalisation of image-based profiles (Caicedo et al., "Data-analysis strategies for image-based cell
    profiling", Nature Methods 2017), to all images of a plate or to its untreated ones. A feature without spread among the
    reference images is centred and keeps its scale.

    Parameters
    ----------
    features
        (N, D) embeddings.
    plates
        (N,) names; plates of two labs are to have two.
    reference
        (N,) whether mean and standard deviation are taken over the image.

    Returns
    -------
    ndarray
        (N, D) float32.

    Raises
    ------
    ValueError
        When shapes disagree, a feature is not finite or a plate has fewer than two reference images.
    """
    rows = _finite_rows(features)
    _check_names("plates", plates, rows)
    _check_names("reference", reference, rows)
    result = np.empty(rows.shape, dtype=np.float32)
    names, code = np.unique(plates, return_inverse=True)
    for number, name in enumerate(names):
        inside = code == number
        own = rows[inside & reference]
        if len(own) < 2:
            raise ValueError(f"plate {name} has {len(own)} images to take its mean and spread from, and needs two")
        result[inside] = StandardScaler().fit(own).transform(rows[inside])
    return result


@dataclass(frozen=True)
class Sphering:
    """Whitening that leaves untreated wells no preferred direction.

    Typical variation normalisation (Ando, McLean and Berndl 2017, bioRxiv 161422), called sphering in pycytominer: what
    varies among negative controls is technical or natural variation; scaling its directions to equal variance lets the
    effects of compounds stand out. ZCA turns the features as little as possible.

    Parameters
    ----------
    mean
        (D,) mean of the controls.
    whitening
        (D, D) symmetric matrix V (Λ + ε) ^ -1/2 Vᵀ, where V Λ Vᵀ is the covariance of the controls.
    """

    mean: NDArray[np.float64]
    whitening: NDArray[np.float64]

    @classmethod
    def fit(cls, controls: NDArray[np.floating[Any]], *, regularisation: float = 1e-2) -> Self:
        """Learn from untreated wells.

        Parameters
        ----------
        controls
            (M, D) embeddings of DMSO wells.
        regularisation
            ε as a share of the mean eigenvalue of the covariance. It bounds the gain of directions in which the controls
            hardly vary, or, with no more controls than features, do not vary at all.

        Raises
        ------
        ValueError
            When there are fewer than two controls, no more than D without regularisation, all are alike, a feature is not
            finite or the regularisation is negative.
        """
        rows = _finite_rows(controls)
        count, width = rows.shape
        if regularisation < 0:
            raise ValueError(f"regularisation = {regularisation}: give 0 or a share of the mean eigenvalue, such as 0.01")
        if count < 2:
            raise ValueError(f"sphering needs two controls or more, it has {count}; give the features of all DMSO images")
        if count <= width and not regularisation:
            raise ValueError(
                f"sphering of {width} features without regularisation needs more than {width} controls, it has {count}; "
                "give more DMSO images, or a regularisation above 0"
            )
        values, vectors = np.linalg.eigh(_covariance(rows))
        if values[-1] <= 0:
            raise ValueError(f"the {count} controls are all alike; check the features of the DMSO images")
        # Rounding may leave eigenvalues a little below zero.
        regular = values.clip(min=0) + regularisation * values.mean()
        if regular[0] <= values[-1] * width * np.finfo(np.float64).eps:
            raise ValueError(
                f"the covariance of the {count} controls has no inverse: features depend on each other; "
                "give a regularisation above 0"
            )
        return cls(rows.mean(axis=0), _power(regular, vectors, -0.5))

    def transform(self, features: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        """Centre at the controls' mean and whiten.

        Parameters
        ----------
        features
            (N, D) embeddings, treated or not.

        Returns
        -------
        ndarray
            (N, D) float32.

        Raises
        ------
        ValueError
            When the number of features is not that of the controls, or a feature is not finite.
        """
        rows = _finite_rows(features)
        if rows.shape[1] != len(self.mean):
            raise ValueError(f"features have {rows.shape[1]} columns, the controls had {len(self.mean)}; use the same model")
        whitened: NDArray[np.float32] = ((rows - self.mean) @ self.whitening).astype(np.float32)
        return whitened


@dataclass(frozen=True)
class Coral:
    """Features of a source, coloured like those of a target: its covariance in place of their own.

    Correlation alignment (Sun, Feng and Saenko, "Return of frustratingly easy domain adaptation", AAAI 2016, algorithm 1): both
    sides are scaled to mean 0 and variance 1 by themselves, then the source alone is whitened and re-coloured; what classifies
    is trained on it afterwards. The identity is added to both covariances, as there, so that fewer rows than features will do.

    Parameters
    ----------
    source_scale, target_scale
        Mean and spread of each side.
    recolouring
        (D, D) matrix (C_s + I) ^ -1/2 (C_t + I) ^ 1/2 of the covariances of the scaled sides.
    """

    source_scale: StandardScaler
    target_scale: StandardScaler
    recolouring: NDArray[np.float64]

    @classmethod
    def fit(cls, source: NDArray[np.floating[Any]], target: NDArray[np.floating[Any]]) -> Self:
        """Learn both covariances; no label takes part.

        Parameters
        ----------
        source, target
            (M, D) and (N, D) embeddings by one model.

        Raises
        ------
        ValueError
            When the number of features differs, a side has fewer than two rows or a feature is not finite.
        """
        sides = _finite_rows(source), _finite_rows(target)
        for name, rows in zip(("source", "target"), sides, strict=True):
            if len(rows) < 2:
                raise ValueError(f"CORAL needs two rows or more of each side, the {name} has {len(rows)}")
        if sides[0].shape[1] != sides[1].shape[1]:
            raise ValueError(f"source {sides[0].shape} and target {sides[1].shape} must have the same features; use one model")
        scales = [StandardScaler().fit(rows) for rows in sides]
        covariances = [_covariance(scale.transform(rows)) for scale, rows in zip(scales, sides, strict=True)]
        own, wanted = (covariance + CORAL_RIDGE * np.eye(len(covariance)) for covariance in covariances)
        return cls(scales[0], scales[1], _power(*np.linalg.eigh(own), -0.5) @ _power(*np.linalg.eigh(wanted), 0.5))

    def transform_source(self, features: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        """Scale and re-colour features of the source.

        Parameters
        ----------
        features
            (N, D) embeddings.

        Returns
        -------
        ndarray
            (N, D) float32.

        Raises
        ------
        ValueError
            When the number of features is another than in `fit`, or a feature is not finite.
        """
        coloured: NDArray[np.float32] = (_scaled(self.source_scale, features) @ self.recolouring).astype(np.float32)
        return coloured

    def transform_target(self, features: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        """Scale features of the target, which keep their colour; as `transform_source`."""
        return _scaled(self.target_scale, features).astype(np.float32)


def harmony(features: NDArray[np.floating[Any]], batches: NDArray[Any], *, seed: int, threads: int = 1) -> NDArray[np.float32]:
    """Remove batch effects by Harmony: soft clusters that mix the batches, and a linear correction of each cluster.

    Korsunsky et al., "Fast, sensitive and accurate integration of single-cell data with Harmony", Nature Methods 2019, as
    harmonypy has it, with its settings: θ 2, σ 0.1, λ estimated for each cluster, one cluster for 30 rows and at most 100,
    up to 10 rounds. The paper corrects principal components; a few hundred features of a network go in as they are.

    Parameters
    ----------
    features
        (N, D) embeddings.
    batches
        (N,) strings or integers.
    seed
        Of the initial clusters.
    threads
        Of the computation; the result is the same for any number.

    Returns
    -------
    ndarray
        (N, D) float32.

    Raises
    ------
    ValueError
        When shapes disagree, a feature is not finite, there is one batch only, or there are fewer than 30 rows.
    ImportError
        Without harmonypy, which is an extra of its own because of its licence (GPL-3.0-or-later).
    """
    import harmonypy

    rows = _finite_rows(features)
    _check_names("batches", batches, rows)
    names, code = np.unique(batches, return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"harmony needs two batches or more, it has {names.tolist()}; give the features of several batches")
    if len(rows) < HARMONY_ROWS_PER_CLUSTER:
        raise ValueError(f"harmony needs {HARMONY_ROWS_PER_CLUSTER} rows or more, it has {len(rows)}; give image features")
    # It guesses which axis is which, and guesses wrong for a square (N, D): (D, N) is the form it takes as it is. The
    # answer is (N, D).
    made = harmonypy.run_harmony(rows.T, {"batch": code}, "batch", random_state=seed, ncores=threads, verbose=False)
    corrected: NDArray[np.float32] = np.asarray(made.Z_corr, dtype=np.float32)
    return corrected


@dataclass(frozen=True)
class LinearProbe:
    """Multinomial logistic regression on standardised features: how much a linear classifier reads out of them.

    Linear evaluation as in Chen et al. (ICML 2020, "A simple framework for contrastive learning of visual representations",
    section 2.3), with scikit-learn's L-BFGS in place of gradient steps and its L2 regularisation of strength 1.

    Parameters
    ----------
    model
        The scale of the features and the classifier.
    n_classes
        K.
    """

    model: Pipeline
    n_classes: int

    @classmethod
    def fit(cls, features: NDArray[np.floating[Any]], labels: NDArray[np.integer[Any]], n_classes: int) -> Self:
        """Learn from labelled images.

        Parameters
        ----------
        features
            (N, D) embeddings.
        labels
            (N,) integers in [0, K); not every class needs to be present.
        n_classes
            K.

        Raises
        ------
        ValueError
            When shapes disagree, a feature is not finite, a label lies outside [0, K) or there is one class only.
        """
        rows, labels = _finite_rows(features), np.asarray(labels)
        _check_names("labels", labels, rows)
        if labels.min() < 0 or labels.max() >= n_classes:
            raise ValueError(f"labels span [{labels.min()}, {labels.max()}] for {n_classes} classes")
        if labels.min() == labels.max():
            raise ValueError(f"all labels are {labels[0]}; a classifier needs images of two classes or more")
        return cls(make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(rows, labels), n_classes)

    def probabilities(self, features: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        """Predict.

        Parameters
        ----------
        features
            (N, D) embeddings.

        Returns
        -------
        ndarray
            (N, K) float32 softmax outputs; a class that was not present in training has probability 0.

        Raises
        ------
        ValueError
            When the number of features is not that of the training, or a feature is not finite.
        """
        rows = _finite_rows(features)
        result = np.zeros((len(rows), self.n_classes), dtype=np.float32)
        result[:, self.model.classes_] = self.model.predict_proba(rows)
        return result


def _finite_rows(features: NDArray[Any]) -> NDArray[np.float64]:
    """Features as (N, D) double precision."""
    rows: NDArray[np.float64] = np.asarray(features, dtype=np.float64)
    if rows.ndim != 2 or not rows.size:
        raise ValueError(f"features {rows.shape} must be (N, D) with one row or more")
    if not np.isfinite(rows).all():
        raise ValueError("features hold values that are not finite; the model that gave them has diverged")
    return rows


def _covariance(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Covariance as (D, D), also of one feature."""
    width = rows.shape[1]
    return np.asarray(np.cov(rows, rowvar=False), dtype=np.float64).reshape(width, width)


def _power(values: NDArray[np.float64], vectors: NDArray[np.float64], exponent: float) -> NDArray[np.float64]:
    """Raise the symmetric matrix of some eigenvalues and eigenvectors to a power."""
    return (vectors * values**exponent) @ vectors.T


def _scaled(scale: StandardScaler, features: NDArray[Any]) -> NDArray[np.float64]:
    """Scale (N, D) features, of the width that the scale was fitted to."""
    rows = _finite_rows(features)
    if rows.shape[1] != len(scale.mean_):
        raise ValueError(f"features have {rows.shape[1]} columns, those of the fit had {len(scale.mean_)}; use the same model")
    scaled: NDArray[np.float64] = scale.transform(rows)
    return scaled


def _check_names(what: str, names: NDArray[Any], rows: NDArray[np.float64]) -> None:
    """Refuse names that are not one per row."""
    if np.shape(names) != (len(rows),):
        raise ValueError(f"{what} {np.shape(names)} and features {rows.shape} must be (N,) and (N, D)")
