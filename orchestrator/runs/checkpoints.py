"""Where the checkpoints of a run are: in its output directory, or below a URL that `OUT/storage.json` records.

Runs with one `checkpoint.storage` have a folder each below it, named after the run, its output directory and a random
number. The record stays with the output directory, so neither a new name nor a new place of the storage loses it.
"""

from __future__ import annotations

import errno
import json
import re
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bim.orchestrator.config.schema import Settings
from bim.orchestrator.files import StorageError, atomic_write
from bim.orchestrator.training.checkpoint import CheckpointStore
from bim.orchestrator.training.remote_checkpoints import RemoteCheckpointStore
from bim.orchestrator.training.storage import RETRY_AT_START_S, Location, check_storage

STORAGE_RECORD = "storage.json"

RunCheckpoints = CheckpointStore | RemoteCheckpointStore


@dataclass(frozen=True)
class StorageRecord:
    """Where the checkpoints of a run are.

    Args:
        url: `checkpoint.storage`.
        folder: of this run below it.
    """

    url: str
    folder: str

    @property
    def location(self) -> str:
        return f"{self.url}/{self.folder}"


def read_storage_record(out: Path) -> StorageRecord | None:
    """The record in an output directory; None: checkpoints are in the directory itself.

    Raises:
        StorageError: it cannot be read.
    """
    path = out / STORAGE_RECORD
    try:
        values = json.loads(path.read_bytes())
        record = StorageRecord(values["url"], values["folder"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        cause = getattr(error, "strerror", None) or "it does not tell where checkpoints are"
        raise StorageError(errno.EINVAL, f"cannot be read ({cause})", str(path)) from error
    if not (isinstance(record.url, str) and "://" in record.url and isinstance(record.folder, str)):
        raise StorageError(errno.EINVAL, "cannot be read (it does not tell where checkpoints are)", str(path))
    return record


def record_storage(out: Path, settings: Settings) -> None:
    """Record where the checkpoints of the run in `out` are from now on, unless they are in `out` itself.

    Raises:
        StorageError: the file system refuses.
    """
    url = settings.checkpoint.storage
    if url is None:
        return
    record = read_storage_record(out)
    if record is None:
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{settings.name}-{out.name}")[:100]
        record = StorageRecord(url, f"{name}-{secrets.token_hex(4)}")
    elif record.url == url:
        return
    write_storage_record(out, StorageRecord(url, record.folder))


def write_storage_record(out: Path, record: StorageRecord) -> None:
    """Write the record. Raises StorageError."""
    atomic_write(out / STORAGE_RECORD, json.dumps(asdict(record), indent=1) + "\n")


def checkpoint_store(out: Path, keep: int = 2, **options: Any) -> RunCheckpoints:
    """The checkpoints of the run in `out`. options: further ones of both stores.

    Raises:
        StorageError: the record cannot be read.
    """
    record = read_storage_record(out)
    if record is None:
        return CheckpointStore(out, keep, **options)
    return RemoteCheckpointStore(record.location, keep, **options)


def checkpoints_location(out: Path) -> Location:
    """Where the checkpoints of the run in `out` are, for other processes."""
    record = read_storage_record(out)
    return out if record is None else record.location


def committed_folder(out: Path, step: int) -> Location:
    """The folder of a committed checkpoint, to be read from any node. Raises StorageError."""
    store = checkpoint_store(out)
    if isinstance(store, CheckpointStore):
        return store.directory(step)
    folder = store.committed(step)
    if folder is None:
        raise StorageError(errno.ENOENT, f"has no checkpoint of step {step} any more", store.url)
    return folder


def check_checkpoint_storage(out: Path, settings: Settings) -> None:
    """Find out before a run starts whether its checkpoints can be written, and, if it is resumed, found.

    Raises:
        StorageUnsupportedError: this installation cannot open the URL.
        StorageError: the storage refuses or cannot be reached, or the checkpoints of the run are elsewhere.
    """
    url = settings.checkpoint.storage
    if url is not None:
        check_storage(url)
    if not settings.resume:
        return
    record = read_storage_record(out)
    if record is None:
        if url is not None and CheckpointStore(out).latest() is not None:
            raise StorageError(
                errno.EINVAL,
                f"has no checkpoints of this run: they are in {out / 'checkpoints'}; give --checkpoint.storage null",
                url,
            )
    elif url is None:
        raise StorageError(
            errno.EINVAL,
            f"has its checkpoints in {record.location}; give --checkpoint.storage {record.url}",
            str(out),
        )
    elif url != record.url:
        moved = StorageRecord(url, record.folder)
        if RemoteCheckpointStore(moved.location, retry_for_s=RETRY_AT_START_S).latest() is None:
            raise StorageError(
                errno.EINVAL,
                f"is empty; copy {record.location} there, or give --checkpoint.storage {record.url}",
                moved.location,
            )
