"""Uploads that a store has not taken yet: a file each in `OUT/uploads`, so that no end of a process loses them."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bim.orchestrator.files import atomic_write, make_folder

FOLDER = "uploads"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Upload:
    """One upload.

    Args:
        number: its place in the order.
        name: of what is uploaded, for messages; a newer upload of the same name takes its place.
        kind: the method of `RunWriter` that sends it.
        arguments: of that method; plain values of JSON.
        first: whether it goes before all others.
    """

    number: int
    name: str
    kind: str
    arguments: dict[str, Any]
    first: bool = False


class UploadQueue:
    """The uploads of one run, in order. Threads may share it.

    Args:
        folder: of the files; what an earlier process left there is still to be sent.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._uploads: dict[int, Upload] = {}
        self._write_failed = False
        for path in sorted(folder.glob("*.json")):
            try:
                record = json.loads(path.read_text(encoding="utf-8"))
                arguments = {str(key): value for key, value in record["arguments"].items()}
                upload = Upload(
                    int(path.stem), str(record["name"]), str(record["kind"]), arguments, bool(record["first"])
                )
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                log.warning("skipped %s, which is not an upload (%s)", path, error)
                continue
            self._uploads[upload.number] = upload
        self._next = 1 + max(self._uploads, default=0)

    def put(self, name: str, kind: str, arguments: Mapping[str, Any], first: bool = False) -> None:
        """Add an upload; never raises because of the disk. The one of the same name that waits is dropped."""
        with self._lock:
            upload = Upload(self._next, name, kind, dict(arguments), first)
            self._next += 1
            content = {"name": name, "kind": kind, "first": first, "arguments": upload.arguments}
            try:
                make_folder(self._folder)
                atomic_write(self._path(upload), json.dumps(content))
            except OSError as error:
                if not self._write_failed:
                    log.warning(
                        "uploads to MLflow cannot be kept in %s (%s); those that this process cannot send are lost",
                        self._folder,
                        error.strerror,
                    )
                self._write_failed = True
            for other in [other for other in self._uploads.values() if other.name == name]:
                self._drop(other)
            self._uploads[upload.number] = upload

    def waiting(self) -> list[Upload]:
        """What is to be sent, in order."""
        with self._lock:
            return sorted(self._uploads.values(), key=lambda upload: (not upload.first, upload.number))

    def remove(self, upload: Upload) -> None:
        """It was sent; a newer one of the same name stays."""
        with self._lock:
            self._drop(upload)

    def discard(self, *names: str) -> None:
        """Drop the uploads of these names."""
        with self._lock:
            for upload in [upload for upload in self._uploads.values() if upload.name in names]:
                self._drop(upload)

    def clear(self) -> None:
        """Drop all of them."""
        self.discard(*(upload.name for upload in self.waiting()))

    def _drop(self, upload: Upload) -> None:
        self._uploads.pop(upload.number, None)
        with contextlib.suppress(OSError):
            self._path(upload).unlink(missing_ok=True)
            if not self._uploads:
                self._folder.rmdir()

    def _path(self, upload: Upload) -> Path:
        return self._folder / f"{upload.number:08d}.json"
