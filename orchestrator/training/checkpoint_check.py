"""Whether a checkpoint folder on a disk can be gone on from: its manifest, and the files that it names."""

from __future__ import annotations

import os
import stat
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


def step_of(directory: Path) -> int:
    """The step in the name of a folder."""
    return int(directory.name.removeprefix("step-"))


def has_manifest(directory: Path) -> bool:
    """Whether the checkpoint was committed: whatever lies in the place of its manifest."""
    return os.path.lexists(directory / MANIFEST)


def intact_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint folder. Raises CheckpointError if it or a file that it names is missing or damaged."""
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
    with _check(path) as size:
        if size != record.size:
            raise CheckpointError(f"{record.name} has {size} of {record.size} bytes")
        if _crc32(path) != record.crc32:
            raise CheckpointError(f"{record.name} has a wrong checksum")


@contextmanager
def _check(path: Path) -> Iterator[int]:
    """Inside, a file is read, whose size is given; raises CheckpointError where that is impossible."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path.name} is not a file")
        yield status.st_size
    except FileNotFoundError:
        raise CheckpointError(f"{path.name} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read ({error.strerror or error})") from None


def _crc32(path: Path, chunk_bytes: int = 1 << 22) -> int:
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(chunk_bytes):
            value = zlib.crc32(chunk, value)
    return value
