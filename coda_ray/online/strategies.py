"""What each strategy does as plates arrive: which model predicts each plate, what that model knew, and who pays for it.

Plain values in, plain values out; `evaluation` makes stages of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from coda_ray.config import Granularity, Strategy
from coda_ray.jump.layout import PlateName

MEANING: dict[Strategy, str] = {
    "none": "the source's model predicts every plate as it is",
    "plate": "adapted from the pre-trained model to each plate, with partners from the plates that are there",
    "batch": "adapted from the pre-trained model to each batch when its last plate is there; all its plates wait for that",
    "continue": "adapted to each plate, from where the plate before left the model",
    "reuse": "adapted to the first plate, and used for all",
}


@dataclass(frozen=True)
class Adaptation:
    """One adaptation of the pre-trained model.

    Parameters
    ----------
    granularity, unit
        What is adapted to.
    known
        Names of the plates that it knows of, in the order of their arrival.
    start
        The adaptation that it goes on from; None starts from the pre-trained model.
    """

    granularity: Granularity
    unit: str
    known: tuple[str, ...]
    start: "Adaptation | None" = None


@dataclass(frozen=True)
class Turn:
    """One plate under one strategy.

    Parameters
    ----------
    number
        Place of the plate in the order of arrival, from 1.
    plate
        The plate that is predicted.
    model
        What predicts it; None is the source's model.
    known
        Names of the plates that have arrived when it is predicted.
    charged
        Adaptations whose cost this turn bears.
    """

    number: int
    plate: PlateName
    model: Adaptation | None
    known: tuple[str, ...]
    charged: tuple[Adaptation, ...]

    @property
    def waits(self) -> int:
        """How many plates had to arrive after this one before it could be predicted."""
        return len(self.known) - self.number


def turns_of(strategy: Strategy, plates: Sequence[PlateName]) -> list[Turn]:
    """Plan the turns of one strategy.

    Parameters
    ----------
    strategy
        What is done when a plate arrives.
    plates
        Those of one source, in any order; they arrive by batch and name.

    Returns
    -------
    list of Turn
        One per plate, in the order of arrival.
    """
    ordered = sorted(plates)
    if strategy == "batch":
        return _per_batch(ordered)
    names, turns = tuple(plate.plate for plate in ordered), list[Turn]()
    for number, plate in enumerate(ordered, 1):
        known, before = names[:number], turns[-1].model if turns else None
        if strategy == "none":
            model = None
        elif strategy == "reuse" and before:
            model = before
        else:
            model = Adaptation("plate", plate.plate, known, before if strategy == "continue" else None)
        turns.append(Turn(number, plate, model, known, (model,) if model and model != before else ()))
    return turns


def _per_batch(ordered: Sequence[PlateName]) -> list[Turn]:
    """Predict the plates of a batch when its last is there, which bears the cost."""
    turns = list[Turn]()
    for batch, group in groupby(ordered, key=lambda plate: plate.batch):
        members = list(group)
        last = len(turns) + len(members)
        known = tuple(plate.plate for plate in ordered[:last])
        model = Adaptation("batch", batch, known)
        for number, plate in enumerate(members, len(turns) + 1):
            turns.append(Turn(number, plate, model, known, (model,) if number == last else ()))
    return turns
