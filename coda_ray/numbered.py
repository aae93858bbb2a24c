"""Files of a folder that are named by numbers: `000001.json`, and more of one number: `000001.beat.json`."""

import re

_NAME = re.compile(r"(\d{6,})(?:\.([a-z]+))?\.json")


def numbered(number: int, kind: str = "") -> str:
    """Name the file of a number.

    Parameters
    ----------
    number
        From 0.
    kind
        Which file of that number; empty for the first.
    """
    return f"{number:06d}.{kind}.json" if kind else f"{number:06d}.json"


def number_and_kind(name: str) -> tuple[int, str] | None:
    """Read the name of a file; None where it is no such name.

    Returns
    -------
    tuple of int and str, or None
        As `numbered` takes them.
    """
    match = _NAME.fullmatch(name)
    return (int(match[1]), match[2] or "") if match else None
