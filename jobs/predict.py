"""Predict the mechanism of action of whole plates with a model, and embed them: tables and a picture per plate.

Labels are neither needed nor read. Section `predict` says what; the same command again predicts only plates that are missing.
"""

import sys

from coda_ray.config import Config, parse_job, told_in_one_line


def main() -> int:
    """Run the job."""
    config = parse_job(Config, prog="jobs/predict.py", description=__doc__ or "")
    from coda_ray.cluster import start_ray
    from coda_ray.config import ConfigError
    from coda_ray.jump.ingest import IngestError
    from coda_ray.pipeline.models import find_model
    from coda_ray.pipeline.predict import PredictionError, ingest_missing, predict, tiles_of
    from coda_ray.pipeline.task import check_resources
    from coda_ray.progress import progress_bar
    from coda_ray.tiles.stream import UnreadableTilesError
    from coda_ray.tracking.registry import RegistryError
    from coda_ray.training.checkpoints import DamagedFileError

    expected = (IngestError, PredictionError, RegistryError, UnreadableTilesError, DamagedFileError)
    with told_in_one_line("jobs/predict.py", *expected):
        if config.predict.model is None:
            raise ConfigError("predict.model is unset; give --predict.model ADDRESS (see jobs/export.py)")
        model = find_model(config, config.predict.model)
        if config.predict.ingest:
            start_ray()
            with progress_bar("ingesting", "sites") as show:
                print(ingest_missing(config, model, show), flush=True)
        tiles = tiles_of(config, model)
        start_ray()
        check_resources(config.train, print)
        with progress_bar("predicting", "tiles") as show:
            done = predict(config, model, tiles, show)
    print(done.text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
