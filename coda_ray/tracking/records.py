"""What the results folder holds: records (JSON) and training curves (parquet), read for tables and for MLflow."""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import fmean
from typing import Any, cast

import pandas as pd

from coda_ray.storage import Folder
from coda_ray.tiles.store import read_parquet

READS_AT_A_TIME = 16
# Records of plates that a watcher reported, below it a folder per job, and in that one per source and batch.
WATCHED = "watched"
# Where a watcher writes its report, unless watch.out says otherwise, and what that holds.
WATCH, WATCH_TABLE, WATCH_FIGURE = "watch", "plates.csv", "drift.png"
IDENTITY = ("source", "target", "method", "granularity", "unit", "scope", "split", "seed")
COUNTS = ("n_images", "n_wells", "n_compounds")
SCORES = ("accuracy", "macro_f1", "well_accuracy", "well_macro_f1", "compound_accuracy", "compound_macro_f1")
INTERVAL = ("accuracy_low", "accuracy_high")
# Of the features on the whole target, whatever the classifier says; missing where they were not measured.
FEATURE_SCORES = ("replicate_map_controls", "replicate_map", "moa_map", "ilisi", "kbet", "silhouette_batch")
MEASURES = (*COUNTS, *SCORES, *INTERVAL, *FEATURE_SCORES, "steps", "seconds")
TRANSFER_COLUMNS = (*IDENTITY, *MEASURES, "key")


def read_records(results: Folder, folder: str) -> list[dict[str, Any]]:
    """Read every `<folder>/*.json` of the results, many at a time.

    Parameters
    ----------
    results
        The results folder.
    folder
        `transfers`, `jobs`, or one below `sweeps` or `online`.

    Returns
    -------
    list
        One mapping per file, in the order of file names.

    Raises
    ------
    ValueError
        When a file is not a JSON object with a `key`.
    """
    return _read_all(results, [f"{folder}/{name}" for name in results.names(folder)])


def watched_path(job: str, plate: Sequence[str]) -> str:
    """Path of the record of a plate that a watcher reported.

    Parameters
    ----------
    job
        Key of the watcher's job.
    plate
        Source, batch and name of the plate.
    """
    return f"{WATCHED}/{job}/{'/'.join(plate)}.json"


def read_watched(results: Folder) -> list[dict[str, Any]]:
    """Read the record of every plate that watchers reported, as `read_records` does."""
    return _read_all(results, [file.path for file in results.files(WATCHED)])


def _read_all(results: Folder, paths: Sequence[str]) -> list[dict[str, Any]]:
    """Read those of some files that are records, many at a time."""
    with ThreadPoolExecutor(READS_AT_A_TIME) as pool:
        return list(pool.map(lambda path: read_record(results, path), [path for path in paths if path.endswith(".json")]))


def read_record(results: Folder, path: str) -> dict[str, Any]:
    """Read one record.

    Raises
    ------
    ValueError
        When the file is not a JSON object with a `key`.
    """
    try:
        record = json.loads(results.read(path))
    except ValueError as error:
        raise ValueError(f"{results.address(path)}: not JSON ({error}); delete it and run its job again") from None
    if not isinstance(record, dict) or "key" not in record:
        raise ValueError(f"{results.address(path)}: not a record with a key; delete it and run its job again")
    return record


def score_name(objective: str) -> str:
    """Name the score of a sweep wherever it is shown, so that one that reads labels says so."""
    return "oracle_score" if objective.startswith("oracle_") else "score"


def trial_measures(record: Mapping[str, Any]) -> dict[str, float]:
    """Take the numbers of a sweep's trial beside its score: every measure of its cells, averaged; without what is missing.

    Parameters
    ----------
    record
        As in `sweeps/<sweep key>/<trial key>.json`.
    """
    cells: list[dict[str, Any]] = record.get("cells", [])
    names = [name for name in (cells[0] if cells else {}) if name not in ("source", "target", "seed")]
    known = {name: [cell[name] for cell in cells if cell[name] is not None] for name in names}
    found = {name: fmean(values) for name, values in known.items() if len(values) == len(cells)}
    spread = f"{score_name(record.get('objective', ''))}_std"
    return found | ({spread: record["score_std"]} if record.get("score_std") is not None else {})


def course_history(record: Mapping[str, Any]) -> pd.DataFrame:
    """Lay a course of an online evaluation out as log points, one per turn.

    Parameters
    ----------
    record
        As in `online/<job key>/<course key>.json`.

    Returns
    -------
    DataFrame
        Columns step (the turn), time_ms, and float64 measures: plate_accuracy, plate_macro_f1 (null where a plate has no label),
        seconds_so_far, steps_so_far.
    """
    turns = pd.DataFrame(record["turns"]).rename(columns={"accuracy": "plate_accuracy", "macro_f1": "plate_macro_f1"})
    measures = ["plate_accuracy", "plate_macro_f1", "seconds_so_far", "steps_so_far"]
    return turns.assign(step=turns["turn"], time_ms=record["time_ms"])[["step", "time_ms", *measures]].astype(
        dict.fromkeys(measures, "float64")
    )


def read_history(results: Folder, stage_path: str | None) -> pd.DataFrame | None:
    """Read the log points of a stage; None where it left none.

    Parameters
    ----------
    results
        The results folder.
    stage_path
        `<stage>/<stage key>`, or None for a transfer without training of its own.

    Returns
    -------
    DataFrame or None
        Columns step (int64), time_ms (int64) and float64 measures, null where not measured.
    """
    if stage_path is None:
        return None
    try:
        return cast(pd.DataFrame, read_parquet(results, f"{stage_path}/history.parquet").to_pandas())
    except FileNotFoundError:
        return None


def transfers_frame(records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Lay transfer records out as a table.

    Parameters
    ----------
    records
        Transfer records; fields beyond the columns are left out.

    Returns
    -------
    DataFrame
        `TRANSFER_COLUMNS`, sorted by the identity and then the key; counts and seed int64, scores float64.

    Raises
    ------
    ValueError
        When a record lacks a column.
    """
    for record in records:
        missing = [name for name in TRANSFER_COLUMNS if name not in record]
        if missing:
            raise ValueError(f"transfers/{record.get('key')}.json lacks {', '.join(missing)}; delete it and run its job again")
    frame = pd.DataFrame([{name: record[name] for name in TRANSFER_COLUMNS} for record in records], columns=TRANSFER_COLUMNS)
    whole = ("seed", *COUNTS, "steps")
    kinds = {name: "int64" if name in whole else "float64" for name in (*MEASURES, "seed")}
    kinds |= {name: "str" for name in TRANSFER_COLUMNS if name not in kinds}
    return frame.astype(kinds).sort_values([*IDENTITY, "key"], ignore_index=True)
