"""What is asked for, and the model of the source that answers it."""

from dataclasses import dataclass

from coda_ray.config import Granularity, Split
from coda_ray.methods import Method
from coda_ray.pipeline.stage import Stage


@dataclass(frozen=True)
class Request:
    """One cell of the result matrix for one seed; an adapting method brings its unadapted model along."""

    source: str
    target: str
    method: Method
    granularity: Granularity
    seed: int
    split: Split = "plate"


@dataclass(frozen=True)
class Model:
    """The stages of an unadapted model.

    Parameters
    ----------
    method
        Its name.
    classifier
        The labelled stage.
    extractor
        The pre-training of its feature extractor; None where it has none of its own.
    imported
        Whether it came as an exported folder. Its source's tiles are then not needed: `moments` and `shares` came along.
    moments
        Of an imported model: the stage with the moments of the tokens on the source; None where they did not come along.
    shares
        Of an imported model: share of each class among the source's images; None where they did not come along.
    """

    method: Method
    classifier: Stage
    extractor: Stage | None
    imported: bool = False
    moments: Stage | None = None
    shares: tuple[float, ...] | None = None

    @property
    def pretrained(self) -> Stage:
        """The pre-training of its feature extractor.

        Raises
        ------
        TypeError
            When it has none of its own.
        """
        if self.extractor is None:
            raise TypeError(f"{self.method} has no feature extractor to adapt")
        return self.extractor
