"""How far each plate has come, read from the ledger: nothing else remembers it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import pandas as pd

from coda_ray.jump.layout import PlateName
from coda_ray.online.ledger import Entry

# What a plate goes through, and the step that leads on from each state.
STEP_AFTER = {"arrived": "ingest", "ingested": "check", "checked": "choose", "chosen": "predict", "predicted": "report"}
DONE, FAILED, ASIDE, AGAIN = "reported", "failed", "aside", "again"
# A model that could not be made is chosen anew.
_BACK_TO = {step: state for state, step in STEP_AFTER.items()} | {"adapt": "checked"}
COLUMNS = {
    "arrived": ("sites", "missing"),
    "ingested": ("tiles", "quarantined"),
    "checked": ("wells", "controls", "drift_source"),
    "chosen": ("nearest", "drift_nearest", "threshold", "model", "why", "target", "granularity", "unit"),
    "predicted": ("model_key", "images", "unreadable", "confidence", "replicate_agreement", "version"),
}


@dataclass
class Journey:
    """How far a plate has come.

    Parameters
    ----------
    plate
        The plate.
    number
        Of its first entry in the ledger: plates keep this order.
    state
        One of `STEP_AFTER`, or `reported`, `aside`.
    facts
        State to what was noted when it was reached.
    failures
        Entries of failed tries.
    """

    plate: PlateName
    number: int
    state: str
    facts: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    failures: list[Entry] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        """Whether nothing more is to be done."""
        return self.state in (DONE, ASIDE)

    @property
    def known(self) -> dict[str, Any]:
        """All that was noted on the way, by name."""
        return {name: value for state in STEP_AFTER for name, value in self.facts.get(state, {}).items()}

    def take(self, entry: Entry) -> None:
        """Follow one entry."""
        if entry.state == AGAIN:
            self.state, self.failures = "arrived", []
            self.facts = {"arrived": self.facts["arrived"]}
        elif entry.state == FAILED:
            self.failures.append(entry)
            self.state = _BACK_TO[entry.facts["step"]]
        else:
            self.state = entry.state
            self.facts[entry.state] = entry.facts

    def is_due(self, now: float, retry_after_s: float) -> bool:
        """Whether it may be tried now.

        Parameters
        ----------
        now
            Unix time (s).
        retry_after_s
            Seconds after the last failure.
        """
        if self.ended or not self.failures:
            return not self.ended
        return now - datetime.fromisoformat(self.failures[-1].at).timestamp() >= retry_after_s


def journeys(entries: Iterable[Entry]) -> dict[PlateName, Journey]:
    """Follow every plate of a ledger.

    Parameters
    ----------
    entries
        In the order of the ledger.

    Returns
    -------
    dict
        In the order of arrival.
    """
    found: dict[PlateName, Journey] = {}
    for entry in entries:
        if entry.plate is not None:
            journey = found.setdefault(entry.plate, Journey(entry.plate, entry.number, entry.state))
            journey.take(entry)
    return found


def plates_table(found: Iterable[Journey]) -> pd.DataFrame:
    """Lay the plates out as a table.

    Parameters
    ----------
    found
        In the order of rows.

    Returns
    -------
    DataFrame
        One row per plate: source, batch, plate, state, tries, what was noted (`COLUMNS`; missing where a plate is not so far)
        and the reason of the last failure.
    """
    rows = []
    for journey in found:
        known = {name: journey.known.get(name) for names in COLUMNS.values() for name in names}
        reason = journey.failures[-1].facts["reason"] if journey.failures and journey.state != DONE else None
        reason = journey.facts[ASIDE]["reason"] if journey.state == ASIDE else reason
        head = {**journey.plate._asdict(), "state": journey.state, "tries": len(journey.failures) + (journey.state != ASIDE)}
        rows.append({**head, **known, "reason": reason})
    columns = [*PlateName._fields, "state", "tries", *(name for names in COLUMNS.values() for name in names), "reason"]
    return pd.DataFrame(rows, columns=columns)
