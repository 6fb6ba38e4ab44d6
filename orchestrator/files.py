"""Files are committed by rename: a reader sees the old content or the new, never a part."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK = "lock"
"""File in a temporary folder, locked as long as its process lives."""


class StorageError(OSError):
    """A file system refuses to write or to read; the message names the path and the cause, for the user.

    Trying again from the last checkpoint does not help: the file system is full, read-only, or gone.
    """

    def __str__(self) -> str:
        return f"{self.filename} {self.strerror}"


def os_error_text(error: OSError) -> str:
    """An error of the system as a part of a sentence: the path, if it names one, and the cause."""
    if isinstance(error, StorageError):
        return str(error)
    cause = error.strerror or str(error) or type(error).__name__
    return f"{os.fsdecode(error.filename)}: {cause}" if isinstance(error.filename, str | bytes) else cause


def is_of_folder(error: OSError, folder: Path) -> bool:
    """Whether an error of the system names a path in `folder`, or the folder itself."""
    names = [name for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    return any(Path(os.fsdecode(name)).is_relative_to(folder) for name in names)


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write `data` (text as UTF-8) under a temporary name, flush it to the disk, rename it to `path`.

    Raises:
        StorageError: the file system refuses; the old content stays.
    """
    # File names that are not UTF-8 are text with lone surrogates; they end no run.
    content = data.encode(errors="backslashreplace") if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path):
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:  # also a signal
            with suppress(OSError):
                temporary.unlink()
            raise


def remove_temporary_files(out: Path) -> None:
    """Remove what killed processes left of their writes below an output directory, which this process alone writes to."""
    with suppress(OSError):
        for temporary in list(out.glob("**/.*.tmp")):
            if temporary.is_dir() and not temporary.is_symlink():
                shutil.rmtree(temporary, ignore_errors=True)
            with suppress(OSError):
                temporary.unlink()


@contextmanager
def temporary_folder(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """A folder that is removed at the end. Those of processes that were killed are removed first.

    It holds a file, `lock`. parent: the folder that it is made in; None: the system's for temporary files.
    """
    parent = parent or Path(tempfile.gettempdir())
    remove_stale_folders(prefix, parent)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        # Held as long as this process lives, and not inherited.
        with open(folder / LOCK, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_stale_folders(prefix: str, parent: Path) -> None:
    """Remove what `temporary_folder` made for processes that were killed."""
    for lock_file in parent.glob(f"{prefix}*/{LOCK}"):
        with suppress(OSError), open(lock_file, "r+") as lock:  # those of other users are not readable
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock_file.parent, ignore_errors=True)


def make_folder(path: Path) -> None:
    """Make a folder, unless it exists, in one that exists: an output directory that is gone is not made again.

    Raises:
        StorageError: the file system refuses, or there is no folder above it.
    """
    with storage_errors(path):
        path.mkdir(exist_ok=True)


@contextmanager
def storage_errors(path: Path, action: str = "written") -> Iterator[None]:
    """Inside, an OSError becomes a StorageError: `path` cannot be written (or another `action`), and why."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        cause = error.strerror or str(error) or type(error).__name__
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
            cause += "; was its folder renamed, removed or unmounted?"
        raise StorageError(error.errno or errno.EIO, f"cannot be {action} ({cause})", str(path)) from error
