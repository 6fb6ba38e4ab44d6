"""`bim sync OUT`: sends what the store of an ended run has not received, and closes the run there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from bim.orchestrator.text import short_path
from bim.orchestrator.tracking.delivery import Delivery
from bim.orchestrator.tracking.metric_log import MetricLog
from bim.orchestrator.tracking.open_run import connect_later
from bim.orchestrator.tracking.run_record import RUN_RECORD, RunRecord, read_run_record
from bim.orchestrator.tracking.run_writer import RunWriter, now_ms
from bim.orchestrator.tracking.store import (
    StoreAddress,
    TrackingError,
    http_timeouts,
    quiet_client_logs,
    summarize_error,
)
from bim.orchestrator.tracking.upload_queue import FOLDER, UploadQueue


class StoreUnavailableError(RuntimeError):
    """The store did not take everything; what it did not take stays."""


@dataclass(frozen=True)
class SyncedRun:
    """A run that its store has as a whole.

    Args:
        num_sent: metrics and uploads that were sent now.
        status: of the run in the store.
    """

    folder: Path
    num_sent: int
    status: str


def recorded_folders(out: Path) -> list[Path]:
    """The output directory and those of its backbones, as far as they belong to an MLflow run.

    Raises TrackingError if none does.
    """
    folders = [out, *sorted(path for path in out.glob("*") if path.is_dir())]
    recorded = [folder for folder in folders if (folder / RUN_RECORD).exists()]
    if not recorded:
        raise TrackingError(f"{out} is no output directory of a run: it has no {RUN_RECORD}")
    return recorded


def sync_run(folder: Path, uri: str | None = None) -> SyncedRun:
    """Send what the run in `folder` recorded, and end it. A run whose process was killed ends as KILLED.

    Args:
        uri: the tracking URI, where the one in `folder` is without its password or no longer right.

    Raises:
        TrackingError: `folder` does not say which run of which store it belongs to.
        StoreUnavailableError: the store did not take everything.
    """
    record = read_run_record(folder)
    if record is None:
        raise TrackingError(f"{folder} has no {RUN_RECORD}")
    address = StoreAddress(uri or _recorded_uri(record, folder))
    writer = RunWriter(connect_later(address), address, record.stored_run(folder.name), folder)
    queue = UploadQueue(folder / FOLDER)
    delivery = Delivery(folder, MetricLog(folder / "metrics.jsonl", same_store=True), queue, writer)
    with http_timeouts(retries=1, seconds=60), quiet_client_logs():
        try:
            delivery.send(final=True)
            if writer.status() == "RUNNING":  # its process was killed
                writer.end("KILLED", now_ms())
            writer.end_children()
            return SyncedRun(folder, delivery.num_sent, writer.status())
        except Exception as error:  # each kind of store has its own errors
            raise StoreUnavailableError(
                f"{short_path(folder)}: MLflow at {address} has not taken everything ({summarize_error(error)}); "
                f"sent {delivery.num_sent}, the rest is kept"
            ) from error


def _recorded_uri(record: RunRecord, folder: Path) -> str:
    """Raises TrackingError if the record has no password and the environment does not name the store either."""
    if record.is_complete:
        return record.uri
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    raise TrackingError(
        f"the password of the store {record.uri} is not kept in {folder}; give --tracking.uri or set MLFLOW_TRACKING_URI"
    )
