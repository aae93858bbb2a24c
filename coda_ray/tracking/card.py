"""The card of an exported model: what it is, what it was trained on, how it scores, where it ends."""

import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import pandas as pd
from jinja2 import Environment, StrictUndefined

CARD = "README.md"
TEMPLATE = "card.md"
_ON_SOURCE = (
    "The feature extractor was trained without labels ({}), and is frozen under a classifier that was trained with the source's."
)
_GOES_ON = " Then the extractor's training went on with images of the target, without labels; the classifier stayed as it was."
_CB, _DINO, _MAE = (
    _ON_SOURCE.format(how)
    for how in (
        "DINO on pairs of images of one compound from different batches",
        "DINO on single images",
        "a masked autoencoder",
    )
)
# How a method trains.
METHODS = {
    "supervised": "One vision transformer, trained with the source's labels.",
    "dual-dino": _DINO,
    "dual-cb": _CB,
    "dual-mae": _MAE,
    "oda": _DINO + _GOES_ON,
    "coda": _CB + _GOES_ON,
    "oda-mae": _MAE + _GOES_ON,
    "tent": "A model of the source, whose normalisation layers were then moved, without labels, so that it is surer of "
    "the target's images (Tent).",
}


def model_card(description: Mapping[str, Any], key: str, scores: pd.DataFrame, names: Sequence[str]) -> str:
    """Write the card in Markdown.

    Parameters
    ----------
    description
        Content of `model.json`.
    key
        Key of the model.
    scores
        Rows of `pipeline.models.scores_of`; none where nothing was scored.
    names
        The scores that are shown.

    Returns
    -------
    str
        The whole file.
    """
    text = (files("coda_ray.tracking") / TEMPLATE).read_text(encoding="utf-8")
    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(text)  # noqa: S701 (Markdown)
    shown = {"key": key, "method": METHODS[description["origin"]["method"]], "scores": scores.to_dict("records")}
    return template.render(**description, **shown, names=names, percent=_percent)


def _percent(value: float) -> str:
    """Show a share; one seed has no deviation."""
    return "–" if math.isnan(value) else f"{100 * value:.1f}"
