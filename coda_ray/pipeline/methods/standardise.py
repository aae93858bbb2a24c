"""`standardise`: tokens moved, plate by plate, to the source's moments, before the frozen classifier (`learn.moments.align`)."""

from collections.abc import Callable

from coda_ray.config import Config, ConfigError
from coda_ray.pipeline import data
from coda_ray.pipeline.moments import moments
from coda_ray.pipeline.request import Model
from coda_ray.pipeline.stage import Stage
from coda_ray.tiles.store import TileIndex


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
    seen = data.target_tiles(config, model.classifier.inputs["source"], target)
    return moments_on_source(config, model, data.training_tiles), moments(config, seen, target, model.classifier, trained)


def moments_on_source(config: Config, model: Model, tiles_of: Callable[[Config, str], TileIndex]) -> Stage:
    """Plan the moments of an unadapted model's tokens on tiles of its source, or take those that came with it.

    Raises
    ------
    ConfigError
        When the model came without.
    """
    source = model.classifier.inputs["source"]
    if not model.imported:
        return moments(config, tiles_of(config, source), f"the training tiles of {source}", model.classifier)
    if model.moments is None:
        raise ConfigError(
            f"{model.classifier.title}: it was exported without the moments of its tokens on {source}, which standardise, "
            "moments and coda-shot need; run one of them on the source's results, and export it again"
        )
    return model.moments
