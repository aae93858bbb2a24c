"""The card of an exported model: what it is, what it was trained on, how it scores, where it ends."""

import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import pandas as pd
from jinja2 import Environment, StrictUndefined

from coda_ray.methods import row_of

CARD = "README.md"
TEMPLATE = "card.md"


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
    shown = {"key": key, "method": row_of(description["origin"]["method"]).card, "scores": scores.to_dict("records")}
    return template.render(**description, **shown, names=names, percent=_percent)


def _percent(value: float) -> str:
    """Show a share; one seed has no deviation."""
    return "–" if math.isnan(value) else f"{100 * value:.1f}"
