"""`standardise`: tokens moved, plate by plate, to the source's moments, before the frozen classifier (`learn.moments.align`)."""

from coda_ray.config import Config
from coda_ray.pipeline import data
from coda_ray.pipeline.moments import moments
from coda_ray.pipeline.request import Model
from coda_ray.pipeline.stage import Stage


def own_and_wanted(config: Config, model: Model, target: str, trained: Stage | None = None) -> tuple[Stage, Stage]:
    """Plan the moments of a model's tokens on its source, as it is, and on a target, as it is or after training there.

    Parameters
    ----------
    config
        Settings.
    model
        The unadapted model.
    target
        The target.
    trained
        Its training on the target; None measures the model as it is there too.
    """
    source = model.classifier.inputs["source"]
    known, named = data.training_tiles(config, source), f"the training tiles of {source}"
    seen = data.target_tiles(config, source, target)
    return moments(config, known, named, model.classifier), moments(config, seen, target, model.classifier, trained)
