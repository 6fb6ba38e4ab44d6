"""`OUT/tracking.json`: which run of which store an output directory belongs to."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from bim.orchestrator.files import atomic_write
from bim.orchestrator.text import is_redacted
from bim.orchestrator.tracking.records import StoredRun
from bim.orchestrator.tracking.store import StoreAddress, TrackingError

RUN_RECORD = "tracking.json"


@dataclass(frozen=True)
class RunRecord:
    """Fields of the file.

    Args:
        uri: the tracking URI, without its password; that of an SQLite store has an absolute path.
        name, start_time: as in `StoredRun`; empty and 0 in files of earlier versions.
    """

    run_id: str
    experiment_id: str
    uri: str
    name: str = ""
    start_time: int = 0

    @classmethod
    def of(cls, run: StoredRun, address: StoreAddress) -> RunRecord:
        """The record of a run in a store."""
        return cls(run.run_id, run.experiment_id, address.shareable_uri, run.name, run.start_time)

    @property
    def is_complete(self) -> bool:
        """Whether the store can be opened by `uri` alone: it had no password."""
        return not is_redacted(self.uri)

    def stored_run(self, name: str) -> StoredRun:
        """The run. name: where the file has none."""
        return StoredRun(self.run_id, self.experiment_id, self.name or name, self.start_time)


def write_run_record(out: Path, record: RunRecord) -> None:
    """Write the file whole. Raises OSError."""
    atomic_write(out / RUN_RECORD, json.dumps(asdict(record), indent=2) + "\n")


def read_run_record(out: Path) -> RunRecord | None:
    """The file in this output directory; None if there is none.

    Raises TrackingError if it cannot be read: without it, a resumed run would become a new one in silence.
    """
    path = out / RUN_RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        fields = {key: record[key] for key in ("run_id", "experiment_id", "uri")}
        if not all(isinstance(value, str) and value for value in fields.values()):
            raise ValueError("run_id, experiment_id and uri are no text")
        return RunRecord(
            **fields, name=str(record.get("name", "")), start_time=int(record.get("start_time", 0))
        )
    except FileNotFoundError:
        return None
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise TrackingError(
            f"{path}, which names the MLflow run of this directory, cannot be read ({type(error).__name__}: {error}); "
            "remove it to continue as a new MLflow run with all metrics"
        ) from error
