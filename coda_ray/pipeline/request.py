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
    """The stages of an unadapted model."""

    method: Method
    classifier: Stage
    extractor: Stage | None

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
