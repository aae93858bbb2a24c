"""How far plates are from the source and from each other: DMSO images in features of the source's extractor."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from coda_ray.analysis.drift import LEAST_IMAGES, Controls, Reference
from coda_ray.config import Config, ConfigError
from coda_ray.jump.layout import PlateName
from coda_ray.jump.tables import CONTROL, NEGATIVE_CONTROL
from coda_ray.learn.exported import ExportedModel
from coda_ray.pipeline import data
from coda_ray.pipeline.evaluate import FEATURE
from coda_ray.pipeline.predict import PLATE_ID, predict, predictions_folder
from coda_ray.tiles.store import TileIndex, read_parquet

Progress = Callable[[str, str], Any]


class DriftMeter:
    """Measures plates by the predictions of the source's model, whose tables hold the features; Ray must be running.

    Parameters
    ----------
    config
        Settings.
    model
        The source's model.
    progress
        Makes the progress of a title and a unit, as `progress.progress_bar`.
    """

    def __init__(self, config: Config, model: ExportedModel, progress: Progress) -> None:
        self.config, self.model, self.progress = config, model, progress
        self._folder = predictions_folder(config, model.key)
        self._known: dict[tuple[PlateName, ...], Controls | None] = {}

    @cached_property
    def reference(self) -> Reference | None:
        """The controls of the source's training plates; None where they have none."""
        source = self.config.watch.source or ""
        index = data.training_tiles(self.config, source).without_labels()
        self.embed([index], f"embedding {source}")
        return Reference.of([self._features((plate,)) for plate in plates_of(index)])

    @property
    def threshold(self) -> float | None:
        """Distance above which no model fits; None where there is no measure."""
        return self.config.watch.drift_threshold or (self.reference.threshold if self.reference else None)

    def require(self) -> None:
        """Make sure that plates can be compared with the source, and that there is a threshold.

        Raises
        ------
        ConfigError
            When the source has no DMSO images, or a single training plate and no `watch.drift_threshold`.
        """
        source, policy = self.config.watch.source, f"watch.policy = {self.config.watch.policy}"
        if self.reference is None:
            raise ConfigError(
                f"{policy}: no training plate of {source} has {LEAST_IMAGES} DMSO images (Metadata_Control = negcon), from which "
                "drift is measured; give jobs/ingest.py the well and control tables, or take --watch.policy plate or batch"
            )
        if self.threshold is None:
            raise ConfigError(
                f"watch.drift_threshold is unset, and cannot be measured, because {source} has a single training plate with DMSO "
                f"images ({policy}); give --watch.drift_threshold, ingest more plates of {source}, or take --watch.policy plate"
            )

    def embed(self, indices: Sequence[TileIndex], title: str) -> None:
        """Predict tiles with the source's model, many plates in one go; a look-up where that was done."""
        frame = pd.concat([index.frame for index in indices], ignore_index=True)
        whole = TileIndex(frame, indices[0].folder, indices[0].channels)
        with self.progress(title, "tiles") as show:
            predict(self.config, self.model, whole, show)

    def controls(self, plates: Sequence[PlateName]) -> Controls | None:
        """Describe the DMSO images of some plates that were embedded; None where they have too few."""
        names = tuple(plates)
        if names not in self._known:
            features = self._features(names)
            self._known[names] = Controls.of(features) if len(features) >= LEAST_IMAGES else None
        return self._known[names]

    def _features(self, plates: Sequence[PlateName]) -> NDArray[np.float32]:
        """Read the features of the DMSO images of plates."""
        tables = [read_parquet(self._folder, f"{'/'.join(plate)}/images.parquet").to_pandas() for plate in plates]
        found = [table.loc[table[CONTROL] == NEGATIVE_CONTROL].filter(like=FEATURE) for table in tables]
        return np.concatenate([one.to_numpy(np.float32) for one in found]) if found else np.empty((0, 0), np.float32)


def plates_of(index: TileIndex) -> list[PlateName]:
    """Name the plates of some tiles."""
    return [PlateName(*row) for row in index.frame[PLATE_ID].drop_duplicates().itertuples(index=False)]


def tiles_of_plate(config: Config, plate: PlateName) -> TileIndex:
    """Load the tiles of a plate, without labels."""
    index = data.stored_tiles(config, plate.source).without_labels()
    return index.where((index.frame[PLATE_ID] == list(plate)).all(axis=1))
