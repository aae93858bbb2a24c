"""`standardise`: tokens moved, plate by plate, to the source's moments, before the frozen classifier (`learn.moments.align`)."""

from coda_ray.config import Config
from coda_ray.pipeline import data
from coda_ray.pipeline.evaluate import evaluate
from coda_ray.pipeline.moments import moments
from coda_ray.pipeline.request import Model, Request
from coda_ray.pipeline.stage import Stage
from coda_ray.tiles.store import TileIndex


def standardised(config: Config, request: Request, model: Model, index: TileIndex) -> Stage:
    """Plan the evaluation of a model on standardised tokens.

    Parameters
    ----------
    config
        Settings.
    request
        Source and target.
    model
        The unadapted model.
    index
        The target's tiles that are evaluated.
    """
    known, named = data.training_tiles(config, request.source), f"the training tiles of {request.source}"
    seen = data.target_tiles(config, request.source, request.target)
    both = moments(config, known, named, model.classifier), moments(config, seen, request.target, model.classifier)
    return evaluate(config, index, request.target, model.classifier, standardised=both)
