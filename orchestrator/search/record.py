"""The files of a search in OUT/search: its record, a table of its trials, and the best setting as a recipe.

Written after every event, so that a search that is interrupted loses no score and is continued from its record. Plain
values in JSON, CSV and YAML.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from bim.orchestrator.evaluation.metric_info import METRICS
from bim.orchestrator.files import atomic_write, make_folder
from bim.orchestrator.runs.output_dir import NEW_RUN_HINT, OutputError
from bim.orchestrator.search.results import SearchResult, Status, TrialRow, TrialScore, table_rows

FOLDER = "search"
RECORD, TABLE, BEST = "trials.json", "trials.csv", "best.yaml"

RECORD_VERSION = 2
"""Of the format of the record; a search of another one is not continued."""


def save_result(out: Path, result: SearchResult, best_yaml: str | None = None) -> None:
    """Write the record and the table, and the recipe of the best setting, `best_yaml`, at the end of the search."""
    folder = out / FOLDER
    make_folder(folder)
    record = {"version": RECORD_VERSION, **asdict(result)}
    atomic_write(folder / RECORD, json.dumps(record, indent=1) + "\n")
    text, rows = io.StringIO(), table_rows(result)
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    atomic_write(folder / TABLE, text.getvalue())
    if best_yaml is not None:
        atomic_write(folder / BEST, best_yaml)


def load_result(out: Path) -> SearchResult | None:
    """The search in this output directory, finished or not; None if there is none.

    Raises OutputError for a record that cannot be read, and for an unfinished search of an earlier version.
    """
    path = out / FOLDER / RECORD
    remedy = f"remove {path.parent} to search again, or {NEW_RUN_HINT}"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise OutputError(f"the record of the search, {path}, cannot be read: {error}; {remedy}") from error
    try:
        if record.get("version") != RECORD_VERSION:
            if not record["finished"]:
                raise OutputError(
                    f"the search in {out} was started by another version and cannot be continued; {remedy}"
                )
            record = _renamed(record, {"own": "baseline_values", "asked": "search_settings"})
            record["rows"] = [_renamed(row, {"why": "status_reason"}) for row in record["rows"]]
        return _result(record)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"the record of the search, {path}, is damaged ({type(error).__name__}: {error}); {remedy}"
        ) from error


def finished_search(out: Path) -> SearchResult | None:
    """The search in this output directory if it is finished, else None. Raises OutputError as `load_result` does."""
    result = load_result(out)
    return result if result is not None and result.finished else None


def _renamed(record: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {names.get(key, key): value for key, value in record.items()}


def _result(record: dict[str, Any]) -> SearchResult:
    """A record as it was before `asdict`. Raises KeyError, TypeError, ValueError or AttributeError if it is none."""
    rows = tuple(row_from_record(row) for row in record["rows"])
    result = SearchResult(
        metric=METRICS[record["metric"]].key,
        images=int(record["images"]),
        epochs=int(record["epochs"]),
        baseline_values=dict(record["baseline_values"]),
        search_settings=dict(record["search_settings"]),
        fingerprint=str(record["fingerprint"]),
        rows=rows,
        finished=bool(record["finished"]),
    )
    if [row.number for row in rows] != list(range(len(rows))):
        raise ValueError("the trials are not numbered from 0 on")
    if any(row.changes.keys() != result.baseline_values.keys() for row in rows):
        raise ValueError("a trial does not have the settings that are searched")
    if result.finished and not result.completed:
        raise ValueError("it is finished and no trial is")
    return result


def row_from_record(record: dict[str, Any]) -> TrialRow:
    """A row as it was before `asdict`. Raises KeyError, TypeError, ValueError or AttributeError if it is none."""
    status = record["status"]
    if status not in get_args(Status):
        raise ValueError(f"{status!r} is no status of a trial")
    return TrialRow(
        number=int(record["number"]),
        changes=dict(record["changes"]),
        status=status,
        status_reason=str(record["status_reason"]),
        curve=tuple(_score(score) for score in record["curve"]),
        gflops=_number(record["gflops"]),
        images_per_s=_number(record["images_per_s"]),
    )


def _score(record: dict[str, Any]) -> TrialScore:
    by_depth = {int(depth): float(value) for depth, value in record["by_depth"].items()}
    return TrialScore(int(record["epoch"]), float(record["score"]), by_depth)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
