"""Retrieval of replicates and of mechanisms among well profiles, by mean average precision.

Kalinin et al., "A versatile information retrieval framework for evaluating profile strength and similarity", Nature
Communications 2025, with the authors' copairs: every profile ranks its positives and negatives by cosine similarity; the
average precision (AP) of the ranking is averaged per compound (mAP); its p-value is the share of random rankings with the
same numbers of positives and negatives that score higher, corrected over compounds by Benjamini and Hochberg.
"""

import tempfile
from typing import Any, Literal

import numpy as np
import pandas as pd
from copairs.map import average_precision, mean_average_precision
from numpy.typing import NDArray

from coda_ray.jump.tables import CONTROL, NEGATIVE_CONTROL, UNTREATED
from coda_ray.tiles.store import COMPOUND, LABEL, UNIT_COLUMNS

BATCH = UNIT_COLUMNS["batch"]
# Tells DMSO wells from each other, so that none is a replicate of another.
OWN_ROW = "Metadata_Own_Row"
RANDOM_RANKINGS = 10_000
SIGNIFICANT = 0.05
# Rows of the similarity matrix that are ranked at once.
RANKED_AT_ONCE = 256


def replicate_map(
    profiles: NDArray[np.floating[Any]],
    metadata: pd.DataFrame,
    *,
    against: Literal["controls", "compounds"],
    seed: int,
) -> dict[str, float]:
    """Retrieve a compound's replicates in other batches, against DMSO wells or against other compounds.

    Against controls it measures whether the compound's effect is seen again in another batch ("phenotypic activity");
    against compounds, whether it is told from other effects ("distinctiveness"). Negatives come from all batches, that of
    the well itself too: batch effects that outweigh the compound lower the score.

    Parameters
    ----------
    profiles
        (W, D) float32, one row per well; a zero row has no direction and is refused.
    metadata
        W rows: `Metadata_JCP2022`, `Metadata_Batch` and `Metadata_Control` (`negcon` for DMSO, `empty` for wells without
        anything, `poscon` or missing for compounds).
    against
        What the replicates are ranked against.
    seed
        Of the random rankings.

    Returns
    -------
    dict
        `map`: mean over compounds of the mean AP of their wells; `normalized_map`: the same of (AP - chance) / (1 - chance),
        which numbers of wells do not move; `significant`: share of compounds with corrected p < 0.05; `compounds` and
        `profiles`: how many were scored, those with a replicate in another batch.

    Raises
    ------
    ValueError
        When shapes disagree, a profile is zero or not finite, a column is missing, a well has no compound or batch, no
        compound has replicates in two batches, or there is nothing to rank against.
    """
    rows = _check(profiles, metadata, (COMPOUND, BATCH, CONTROL))
    control = (metadata[CONTROL] == NEGATIVE_CONTROL).to_numpy() & (against == "controls")
    chosen = control | ~metadata[CONTROL].isin(UNTREATED).to_numpy()
    wells, control = metadata.loc[chosen, [COMPOUND, BATCH]].reset_index(drop=True), control[chosen]
    if wells.isna().any(axis=None):
        raise ValueError(f"some wells lack {COMPOUND} or {BATCH}; leave them out")
    treated = wells[~control]
    if not control.any() if against == "controls" else treated[COMPOUND].nunique() < 2:
        raise ValueError(f"there are no {against} to rank replicates against; give the profiles of all wells of the plates")
    if not treated.groupby(COMPOUND)[BATCH].nunique().gt(1).any():
        raise ValueError("no compound has wells in two batches; give the profiles of several batches")
    wells[OWN_ROW] = np.where(control, np.arange(len(wells)), -1)
    # Against controls, a negative pair differs in both columns: a treated well and a DMSO well.
    key = [COMPOUND, OWN_ROW] if against == "controls" else [COMPOUND]
    return _map(wells, rows[chosen], key, [BATCH], seed)


def replicate_precision(profiles: NDArray[np.floating[Any]], compounds: NDArray[Any], batches: NDArray[Any]) -> float:
    """Compute `map` of `replicate_map` against compounds and nothing else: fast enough to compare many settings by.

    No list of pairs and no random rankings are made: the memory is that of 256 rows of the similarity matrix.

    Parameters
    ----------
    profiles
        (W, D) float32, one row per treated well; a zero row has no direction and is refused.
    compounds
        (W,) strings or integers.
    batches
        (W,) strings or integers; batches of two labs are to have two names.

    Returns
    -------
    float
        Mean over compounds of the mean average precision of their wells, from 0 to 1; wells without a replicate in another
        batch are not scored.

    Raises
    ------
    ValueError
        When shapes disagree, a profile is zero or not finite, a well has no compound or batch, there is one compound only, or
        none has wells in two batches.
    """
    rows = _check(profiles, pd.DataFrame({COMPOUND: compounds, BATCH: batches}), ())
    (compound, names), (batch, _) = (pd.factorize(np.asarray(values)) for values in (compounds, batches))
    if min(compound.min(), batch.min()) < 0:
        raise ValueError("some wells lack their compound or batch; leave them out")
    if len(names) < 2:
        raise ValueError("there are no compounds to rank replicates against; give the profiles of all wells of the plates")
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    precision = np.full(len(unit), np.nan)
    for start in range(0, len(unit), RANKED_AT_ONCE):
        chunk = slice(start, start + RANKED_AT_ONCE)
        same = compound[chunk, None] == compound
        precision[chunk] = _average_precision(unit[chunk] @ unit.T, same & (batch[chunk, None] != batch), ~same)
    scored = ~np.isnan(precision)
    if not scored.any():
        raise ValueError("no compound has wells in two batches; give the profiles of several batches")
    return float(pd.Series(precision[scored]).groupby(compound[scored]).mean().mean())


def moa_map(profiles: NDArray[np.floating[Any]], metadata: pd.DataFrame, *, seed: int) -> dict[str, float]:
    """Retrieve compounds of the same mechanism of action among all labelled compounds ("phenotypic consistency").

    A compound is the median of its wells over all batches, so that replicates of a compound neither help nor hinder.

    Parameters
    ----------
    profiles
        (W, D) float32, one row per well.
    metadata
        W rows: `Metadata_JCP2022` and `Metadata_MoA`; wells without a label are left out.
    seed
        Of the random rankings.

    Returns
    -------
    dict
        As `replicate_map`; scored are compounds that share their mechanism with another, a profile is a compound.

    Raises
    ------
    ValueError
        When shapes disagree, a profile is zero or not finite, a column is missing, a compound is missing or has several
        labels, no two compounds share a mechanism, or all do.
    """
    rows = _check(profiles, metadata, (COMPOUND, LABEL))
    chosen = metadata[LABEL].notna().to_numpy()
    wells = metadata.loc[chosen, [COMPOUND, LABEL]].reset_index(drop=True)
    if wells[COMPOUND].isna().any():
        raise ValueError(f"some wells lack {COMPOUND}; leave them out")
    labels = wells.groupby(COMPOUND)[LABEL].nunique()
    if (labels > 1).any():
        raise ValueError(f"compound {labels.idxmax()} has several labels; score a compound under one mechanism")
    compounds = wells.drop_duplicates().sort_values(COMPOUND, ignore_index=True)
    per_moa = compounds[LABEL].value_counts()
    if len(per_moa) < 2 or per_moa.max() < 2:
        raise ValueError(
            f"{len(compounds)} compounds of {len(per_moa)} mechanisms cannot be ranked; "
            "give two mechanisms or more, one of them with two compounds"
        )
    consensus = pd.DataFrame(rows[chosen]).groupby(wells[COMPOUND]).median().to_numpy(dtype=np.float32)
    return _map(compounds, consensus, [LABEL], [], seed)


def _map(metadata: pd.DataFrame, profiles: NDArray[np.float32], same: list[str], other: list[str], seed: int) -> dict[str, float]:
    """Score pairs that agree in `same` and differ in `other` against pairs that differ in all of `same`."""
    scored = average_precision(
        metadata, profiles, pos_sameby=same, pos_diffby=other, neg_sameby=[], neg_diffby=same, progress_bar=False
    )
    # A folder of its own: copairs keeps random rankings in the home directory otherwise, and p-values would depend on them.
    with tempfile.TemporaryDirectory() as folder:
        compounds = mean_average_precision(
            scored, [COMPOUND], RANDOM_RANKINGS, SIGNIFICANT, seed, progress_bar=False, cache_dir=folder
        )
    return {
        "map": float(compounds["mean_average_precision"].mean()),
        "normalized_map": float(compounds["mean_normalized_average_precision"].mean()),
        "significant": float(compounds["below_corrected_p"].mean()),
        "compounds": len(compounds),
        "profiles": int((scored["n_pos_pairs"] > 0).sum()),
    }


def _average_precision(
    similarity: NDArray[np.float32], positive: NDArray[np.bool_], negative: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Average the precision at each positive of each row's ranking, (Q, W) to (Q,); NaN where there is none."""
    order = np.argsort(np.where(positive | negative, -similarity, np.inf), axis=1, kind="stable")
    hits = np.take_along_axis(positive, order, axis=1)
    precision = np.cumsum(hits, axis=1) / np.arange(1, hits.shape[1] + 1)
    count = hits.sum(axis=1)
    average: NDArray[np.float64] = np.full(len(count), np.nan)
    np.divide((precision * hits).sum(axis=1), count, out=average, where=count > 0)
    return average


def _check(profiles: NDArray[Any], metadata: pd.DataFrame, columns: tuple[str, ...]) -> NDArray[np.float32]:
    """Profiles as (W, D) float32 that all have a direction."""
    rows: NDArray[np.float32] = np.asarray(profiles, dtype=np.float32)
    if rows.ndim != 2 or not rows.size or len(rows) != len(metadata):
        raise ValueError(f"profiles {rows.shape} and metadata of {len(metadata)} rows must be (W, D) and W")
    missing = [name for name in columns if name not in metadata]
    if missing:
        raise ValueError(f"metadata lacks the column {missing[0]}; it has {', '.join(map(str, metadata))}")
    if not np.isfinite(rows).all() or not np.abs(rows).max(axis=1).all():
        raise ValueError("profiles hold values that are not finite, or a row of zeros; check the features of the wells")
    return rows
