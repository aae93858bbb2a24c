"""The stage that looks at features: well profiles, retrieval of replicates and mechanisms, mixing of batches.

Of an index without the label column it measures what needs no label.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from coda_ray.analysis.mixing import batch_mixing
from coda_ray.analysis.retrieval import moa_map, replicate_map
from coda_ray.config import Config
from coda_ray.pipeline.evaluate import FEATURE, TILE_ID, embeddings_of
from coda_ray.pipeline.stage import Stage
from coda_ray.pipeline.train_stages import Made
from coda_ray.storage import Folder
from coda_ray.tiles.store import COMPOUND, LABEL, TileIndex, table_bytes
from coda_ray.training.loop import Report

WELL_ID = TILE_ID[:-1]
# Of the random rankings that retrieval is compared with.
SEED = 0
MIXING = ("ilisi", "kbet", "silhouette_batch")
Scores = dict[str, float | None]


@dataclass(frozen=True)
class ProfileRun:
    """What a profile worker needs; picklable, without features."""

    folder: Folder
    config: Config
    index: TileIndex
    evaluation: Stage


def profile(config: Config, index: TileIndex, evaluation: Stage) -> Stage:
    """Plan the well profiles of an evaluation, and what they tell.

    Parameters
    ----------
    config
        Settings.
    index
        The tiles that count, among the evaluated ones. With MoA labels, which are read after adaptation and for the scores alone,
        batches are compared within a mechanism; without the label column no mechanism is retrieved, and batches are compared
        within a compound: then no label takes part.
    evaluation
        The stage that has the embeddings.
    """
    title = f"profiles of {evaluation.title}{'' if LABEL in index.frame else ', without labels'}"
    make = partial(_make, config, index, evaluation)
    return Stage("profile", title, {"tiles": index.fingerprint}, make, (evaluation,), runs_on="cpu")


def _make(config: Config, index: TileIndex, evaluation: Stage, folder: Folder, report: Report | None) -> Made:
    """Describe the stage to the worker loop; it has no curve to report."""
    return profile_loop, ProfileRun(folder, config, index, evaluation)


def profile_loop(config: Mapping[str, Any]) -> dict[str, Any]:
    """Write `profiles.parquet` and measure it.

    Parameters
    ----------
    config
        `{"run": ProfileRun}`, as Ray Train passes it.

    Returns
    -------
    dict
        Facts: wells, seconds, `scores` (null where the data have nothing to measure) and, for those, the reasons.
    """
    run: ProfileRun = config["run"]
    begun = time.monotonic()
    images = _annotated(run)
    wells = well_profiles(images)
    table = pa.Table.from_pandas(wells, preserve_index=False)
    run.folder.write("profiles.parquet", table_bytes(table))
    scores, reasons = _measure(images, wells)
    return {"wells": len(wells), "seconds": round(time.monotonic() - begun, 3), "scores": scores, "not_measured": reasons}


def well_profiles(images: pd.DataFrame, measures: Sequence[str] | None = None) -> pd.DataFrame:
    """Average the embeddings of each well's images.

    Parameters
    ----------
    images
        One row per image: Metadata_ columns, `feature_0000`, ... .
    measures
        Columns that are averaged; None takes the features.

    Returns
    -------
    DataFrame
        One row per well, sorted by batch, plate and well: the Metadata_ columns but the site, `Metadata_Image_Count`, and the
        measures, float32.
    """
    features = list(images.filter(like=FEATURE)) if measures is None else list(measures)
    metadata = list(images.filter(like="Metadata_").drop(columns="Metadata_Site"))
    groups = images.groupby(WELL_ID, sort=True)
    wells = groups[metadata].first().reset_index(drop=True)
    wells["Metadata_Image_Count"] = groups.size().to_numpy()
    return pd.concat([wells, groups[features].mean().astype(np.float32).reset_index(drop=True)], axis=1)


def measured(measures: Mapping[tuple[str, ...], Callable[[], Mapping[str, float]]]) -> tuple[Scores, dict[str, str]]:
    """Compute scores; the data may lack what one needs, and then its reason is kept.

    Parameters
    ----------
    measures
        For names of scores, what computes them; a ValueError says what is lacking.

    Returns
    -------
    tuple
        Scores by name, None where there is none, and for those the reasons.
    """
    scores: Scores = {}
    reasons: dict[str, str] = {}
    for names, measure in measures.items():
        try:
            scores.update(measure())
        except ValueError as error:
            scores.update(dict.fromkeys(names))
            reasons.update(dict.fromkeys(names, str(error)))
    return scores, reasons


def _annotated(run: ProfileRun) -> pd.DataFrame:
    """Read the embeddings of the tiles that count, with their labels where the index has that column."""
    found = embeddings_of(run.config, run.evaluation)
    evaluated, known = pd.MultiIndex.from_frame(found[TILE_ID]), run.index.frame.set_index(TILE_ID)
    if LABEL in known:
        found[LABEL] = known[LABEL].reindex(evaluated).to_numpy(object)
    return found[evaluated.isin(known.index)]


def _measure(images: pd.DataFrame, wells: pd.DataFrame) -> tuple[Scores, dict[str, str]]:
    """Compute every score."""
    known = wells[wells[COMPOUND].notna()].reset_index(drop=True)
    profiles = _features(known)

    def replicates(against: Literal["controls", "compounds"]) -> float:
        return replicate_map(profiles, known, against=against, seed=SEED)["normalized_map"]

    measures: dict[tuple[str, ...], Callable[[], Mapping[str, float]]] = {
        ("replicate_map_controls",): lambda: {"replicate_map_controls": replicates("controls")},
        ("replicate_map",): lambda: {"replicate_map": replicates("compounds")},
    }
    if LABEL in known:
        measures["moa_map",] = lambda: {"moa_map": _mechanisms(profiles, known)}
    alike = LABEL if LABEL in images else COMPOUND
    named = images[images[alike].notna()]
    batch, name = named["Metadata_Batch"].to_numpy(str), named[alike].to_numpy(str)
    measures[MIXING] = lambda: batch_mixing(_features(named), batch, name)
    return measured(measures)


def _mechanisms(profiles: NDArray[np.float32], wells: pd.DataFrame) -> float:
    """Score the retrieval of mechanisms among labelled wells."""
    labelled = wells[LABEL].notna().to_numpy()
    return moa_map(profiles[labelled], wells[labelled].reset_index(drop=True), seed=SEED)["normalized_map"]


def _features(frame: pd.DataFrame) -> NDArray[np.float32]:
    """Take the (N, D) features of a table."""
    return frame.filter(like=FEATURE).to_numpy(np.float32)
