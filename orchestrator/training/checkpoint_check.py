"""Whether a checkpoint folder on a disk can be gone on from: its manifest, and the files that it names."""

from __future__ import annotations

import errno
import os
import stat
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bim.orchestrator.training.manifest import (
    MANIFEST,
    CheckpointError,
    FileRecord,
    Manifest,
    parse_manifest_of,
)

RETRY_PAUSES_S = (0.2, 1.0, 3.0)
"""Seconds before a read that failed for a moment is repeated."""

PASSING_ERRORS = frozenset({errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR})
"""What a disk or a network share may say once and not again."""

_intact: dict[Path, tuple[int, ...]] = {}
"""Files whose checksum was right, with the state that they had then: resuming asks several times."""


def step_of(directory: Path) -> int:
    """The step in the name of a folder."""
    return int(directory.name.removeprefix("step-"))


def has_manifest(directory: Path) -> bool:
    """Whether the checkpoint was committed: whatever lies in the place of its manifest."""
    return os.path.lexists(directory / MANIFEST)


def intact_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint folder. Raises CheckpointError if it or a file that it names is missing or damaged.

    A read that fails for a moment, as on a network share, is repeated.
    """
    for pause_s in RETRY_PAUSES_S:
        try:
            return _intact_manifest(directory)
        except CheckpointError as error:
            cause = error.__cause__
            if not isinstance(cause, OSError) or cause.errno not in PASSING_ERRORS:
                raise
            time.sleep(pause_s)
    return _intact_manifest(directory)


def _intact_manifest(directory: Path) -> Manifest:
    manifest = read_manifest(directory)
    for record in manifest.files:
        _check_file(directory / record.name, record)
    return manifest


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint folder, whose files are not looked at. Raises CheckpointError."""
    path = directory / MANIFEST
    if not has_manifest(directory):
        raise CheckpointError("no manifest (incomplete write)")
    with _check(path):
        content = path.read_bytes()
    return parse_manifest_of(step_of(directory), content)


def _check_file(path: Path, record: FileRecord) -> None:
    with _check(path) as status:
        if status.st_size != record.size:
            raise CheckpointError(f"{record.name} has {status.st_size} of {record.size} bytes")
        state = (record.crc32, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if _intact.get(path) == state:
            return
        if _crc32(path) != record.crc32:
            raise CheckpointError(f"{record.name} has a wrong checksum")
        _intact[path] = state


@contextmanager
def _check(path: Path) -> Iterator[os.stat_result]:
    """Inside, a file is read, whose status is given; raises CheckpointError where that is impossible."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path.name} is not a file")
        yield status
    except FileNotFoundError:
        raise CheckpointError(f"{path.name} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read ({error.strerror or error})") from error


def _crc32(path: Path, chunk_bytes: int = 1 << 22) -> int:
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(chunk_bytes):
            value = zlib.crc32(chunk, value)
    return value
