"""A method is data: one row says everything that the rooms ask of a method's name.

`pipeline/methods/plans.py` says how each is planned; no other module tests for a name. docs/extending.md adds one.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

Loss = Literal["dino", "dino-cb", "mae"]


class Style(NamedTuple):
    """How figures draw a method: a colour by its name in `tracking.report_figures`; a model and what adapts it share it."""

    colour: str
    marker: str
    hatch: str = ""


@dataclass(frozen=True)
class MethodRow:
    """What is known of one method.

    Parameters
    ----------
    name
        As in configurations, tables and MLflow.
    style
        In figures.
    model
        The unadapted model that it starts from: its own name for such a model, None for `baselines.model`.
    loss
        Self-supervised loss of its feature extractor, by which a held-out loss is measured: DINO, DINO on cross-batch pairs,
        a masked autoencoder. None: it has none of its own.
    trains
        What training on the target changes: the feature `extractor`, or the `model` whole. None: nothing is trained there.
    objective
        Of a trained method: what its stage minimises. That of its model's pre-training (then its stage does not name it), or
        another, named in the stage's inputs.
    per_unit
        Whether it is fitted to a unit of the target (source, batch or plate).
    beyond_unit
        Whether what was fitted to a unit also reads the other tiles of the target.
    pairs
        Whether it learns from pairs of images of one compound on the target, and so needs the plate map.
    section
        Section of the configuration that the method alone reads.
    rate
        Kind of work of its training, in `estimate` (`<rate>_per_s`).
    holds_out
        Whether compounds can be left out of all that it fits (split `compounds`).
    card
        How it trains, for the card of an exported model; None: it makes no model that can be exported.
    rivals
        Methods that a report compares it with, besides the model that it starts from.
    terms
        Of a source-free method: the terms of `learn.shot.Terms` that it may use; section `shot` weighs them.
    """

    name: str
    style: Style
    model: str | None = None
    loss: Loss | None = None
    trains: Literal["extractor", "model"] | None = None
    objective: str | None = None
    per_unit: bool = False
    beyond_unit: bool = True
    pairs: bool = False
    section: str | None = None
    rate: str | None = None
    holds_out: bool = True
    card: str | None = None
    rivals: tuple[str, ...] = ()
    terms: tuple[str, ...] = ()

    @property
    def unadapted(self) -> bool:
        """Whether it is a model of the source, as it is."""
        return self.model == self.name


def _on_source(how: str) -> str:
    """Text of the card of a dual model."""
    return (
        f"The feature extractor was trained without labels ({how}), and is frozen under a classifier that was trained with the "
        "source's."
    )


_DINO = _on_source("DINO on single images")
_CB = _on_source("DINO on pairs of images of one compound from different batches")
_MAE = _on_source("a masked autoencoder")
_GOES_ON = " Then the extractor's training went on with images of the target, without labels; the classifier stayed as it was."

_THROUGH = " Then the extractor was trained on images of the target, without labels, through the frozen classifier, {}."
_ALL_TERMS = (
    "by DINO, and so that predictions are sure, diverse, and the same for {}, and tokens have the mean and spread of the source's"
)

# In the order of tables.
ROWS: tuple[MethodRow, ...] = (
    MethodRow(
        "supervised",
        Style("grey", "o"),
        model="supervised",
        card="One vision transformer, trained with the source's labels.",
    ),
    MethodRow("dual-mae", Style("orange", "s"), model="dual-mae", loss="mae", card=_MAE),
    MethodRow("dual-dino", Style("green", "^"), model="dual-dino", loss="dino", card=_DINO),
    MethodRow("dual-cb", Style("blue", "D"), model="dual-cb", loss="dino-cb", card=_CB),
    MethodRow("ttt", Style("red", "v", "..."), model="dual-mae", section="ttt"),
    MethodRow(
        "oda-mae",
        Style("orange", "P", "///"),
        model="dual-mae",
        loss="mae",
        trains="extractor",
        objective="mae",
        per_unit=True,
        section="adapt",
        rate="mae",
        card=_MAE + _GOES_ON,
    ),
    MethodRow(
        "oda",
        Style("green", "X", "///"),
        model="dual-dino",
        loss="dino",
        trains="extractor",
        objective="dino",
        per_unit=True,
        section="adapt",
        rate="dino",
        card=_DINO + _GOES_ON,
    ),
    MethodRow(
        "coda",
        Style("blue", "*", "///"),
        model="dual-cb",
        loss="dino-cb",
        trains="extractor",
        objective="dino-cb",
        per_unit=True,
        pairs=True,
        section="adapt",
        rate="dino",
        card=_CB + _GOES_ON,
        rivals=("supervised", "oda", "standardise"),
    ),
    MethodRow(
        "moments",
        Style("pink", "H", "**"),
        model="dual-cb",
        trains="extractor",
        objective="moments",
        per_unit=True,
        section="shot",
        rate="shot",
        card=_CB + _THROUGH.format("whose tokens were to have the mean and spread of the source's"),
        terms=("moments",),
    ),
    MethodRow(
        "shot",
        Style("red", "h", "||"),
        model="dual-cb",
        trains="extractor",
        objective="shot",
        per_unit=True,
        section="shot",
        rate="shot",
        card=_CB + _THROUGH.format("whose predictions were to be sure, diverse, and the same for two views of an image"),
        rivals=("moments",),
        terms=("entropy", "diversity", "consistency"),
    ),
    MethodRow(
        "oda-shot",
        Style("green", "d", "++"),
        model="dual-dino",
        loss="dino",
        trains="extractor",
        objective="oda-shot",
        per_unit=True,
        section="shot",
        rate="shot",
        card=_DINO + _THROUGH.format(_ALL_TERMS.format("two views of an image")),
        rivals=("oda",),
        terms=("dino", "entropy", "diversity", "consistency", "moments"),
    ),
    MethodRow(
        "coda-shot",
        Style("blue", "p", "++"),
        model="dual-cb",
        loss="dino-cb",
        trains="extractor",
        objective="coda-shot",
        per_unit=True,
        pairs=True,
        section="shot",
        rate="shot",
        card=_CB + _THROUGH.format(_ALL_TERMS.format("two images of one compound")),
        rivals=("supervised", "coda", "oda-shot", "shot"),
        terms=("dino", "entropy", "diversity", "consistency", "moments"),
    ),
    MethodRow("probe", Style("sky", "<")),
    MethodRow("standardise", Style("sky", ">", "xx")),
    MethodRow("sphering", Style("sky", "8", "---"), per_unit=True, section="baselines", rivals=("probe",)),
    MethodRow("coral", Style("sky", "$C$", "..."), per_unit=True, section="baselines", rivals=("probe", "sphering")),
    MethodRow(
        "harmony",
        Style("pink", "+", "+++"),
        per_unit=True,
        beyond_unit=False,
        holds_out=False,
        section="baselines",
        rivals=("probe",),
    ),
    MethodRow(
        "tent",
        Style("black", "x", "OO"),
        trains="model",
        objective="tent",
        per_unit=True,
        section="tent",
        rate="tent",
        card="A model of the source, whose normalisation layers were then moved, without labels, so that it is surer of the "
        "target's images (Tent).",
    ),
)
NAMES = tuple(row.name for row in ROWS)
TRAINED = tuple(row.name for row in ROWS if row.trains)
ADAPTING = tuple(row.name for row in ROWS if row.trains == "extractor")
PER_UNIT = frozenset(row.name for row in ROWS if row.per_unit)
UNADAPTED = tuple(row.name for row in ROWS if row.unadapted)
# Sections of the configuration that training on the target alone reads, and a sweep may search.
SECTIONS = tuple(dict.fromkeys(row.section for row in ROWS if row.trains and row.section))
_BY_NAME = {row.name: row for row in ROWS}

if TYPE_CHECKING:
    Method = str
    TrainedMethod = str
    AdaptingMethod = str
    UnadaptedMethod = str
else:  # so that a configuration lists them, and refuses others
    Method = Literal[NAMES]
    TrainedMethod = Literal[TRAINED]
    AdaptingMethod = Literal[ADAPTING]
    UnadaptedMethod = Literal[UNADAPTED]


def row_of(method: str) -> MethodRow:
    """Look a method up.

    Raises
    ------
    KeyError
        When there is no such method.
    """
    return _BY_NAME[method]


def model_with(loss: Loss | None) -> MethodRow:
    """Find the unadapted model whose feature extractor was pre-trained by a loss; None: the one that has no such extractor."""
    return next(row for row in ROWS if row.unadapted and row.loss == loss)


def trained_by(objective: str) -> MethodRow:
    """Find the method whose training on the target minimises an objective.

    Raises
    ------
    KeyError
        When no method does: results of a later release.
    """
    for row in ROWS:
        if row.trains and row.objective == objective:
            return row
    raise KeyError(f"no method minimises {objective!r}")
