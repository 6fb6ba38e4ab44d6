"""Objects below a URL of whatever fsspec opens, with errors in a sentence and requests that are repeated."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from bim.orchestrator.files import StorageError
from bim.orchestrator.text import first_line, redact
from bim.orchestrator.training.errors import StorageUnsupportedError

RETRY_FOR_S = 120.0
"""How long a request that fails is repeated."""

FIRST_DELAY_S, LONGEST_DELAY_S = 0.5, 20.0

WITHOUT_FOLDERS = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "memory")
"""Protocols by which an object is written without making the folders above it; for S3 that would make a bucket."""

PERMANENT_ERRORS = (FileNotFoundError, PermissionError, NotImplementedError, ImportError, TypeError)

Result = TypeVar("Result")

log = logging.getLogger(__name__)


class ObjectStore:
    """Objects below a URL. A request that fails is repeated, with growing pauses, unless the error is a permanent one.

    Keys, regions and endpoints come from the environment, as the package of the protocol reads it.

    Args:
        retry_for_s: how long a request that fails is repeated; None: `RETRY_FOR_S`.

    Raises:
        StorageUnsupportedError: by the constructor.
        StorageError: by every method.
    """

    def __init__(self, url: str, retry_for_s: float | None = None) -> None:
        self.url = url.rstrip("/")
        self.retry_for_s = RETRY_FOR_S if retry_for_s is None else retry_for_s
        self._protocol = url.partition("://")[0]
        self._fs, self._root = _open(self.url)

    def write(self, name: str, data: bytes) -> None:
        """Write an object, by one request that takes effect whole or not at all."""
        path = f"{self._root}/{name}"
        if self._protocol not in WITHOUT_FOLDERS:
            self._request("written to", lambda: self._fs.makedirs(path.rpartition("/")[0], exist_ok=True))
        self._request("written to", lambda: self._fs.pipe_file(path, data))

    def read(self, name: str) -> bytes | None:
        """An object; None if there is none."""

        def read() -> bytes | None:
            try:
                content: bytes = self._fs.cat_file(f"{self._root}/{name}")
            except FileNotFoundError:
                return None
            return content

        return self._request("read", read)

    def sizes(self) -> dict[str, int]:
        """Path below the URL -> bytes, of every object, by one listing."""

        def listed() -> dict[str, dict[str, Any]]:
            self._fs.invalidate_cache()
            try:
                objects: dict[str, dict[str, Any]] = self._fs.find(self._root, detail=True)
            except FileNotFoundError:
                return {}
            return objects

        start = f"{self._root.lstrip('/')}/"
        return {
            path.lstrip("/").removeprefix(start): int(entry["size"])
            for path, entry in self._request("listed", listed).items()
            if path.lstrip("/").startswith(start)
        }

    def exists(self, name: str) -> bool:
        """Whether there is such an object."""

        def exists() -> bool:
            self._fs.invalidate_cache()
            return bool(self._fs.exists(f"{self._root}/{name}"))

        return self._request("read", exists)

    def remove(self, names: Sequence[str]) -> None:
        """Remove objects; those that are gone already do not matter."""

        def remove() -> None:
            try:
                self._fs.rm([f"{self._root}/{name}" for name in names])
            except FileNotFoundError:
                for name in names:
                    if self._fs.exists(f"{self._root}/{name}"):
                        self._fs.rm_file(f"{self._root}/{name}")

        self._request("cleaned up", remove)

    def move(self, name: str, to: str) -> None:
        """Move every object below `name` to `to`: an object store copies and removes."""
        names = [path for path in self.sizes() if path.startswith(f"{name}/")]
        for path in names:
            self._copy(path, f"{to}{path.removeprefix(name)}")
        self.remove(names)

    def _copy(self, path: str, to: str) -> None:
        source, target = f"{self._root}/{path}", f"{self._root}/{to}"
        if self._protocol not in WITHOUT_FOLDERS:
            self._request("written to", lambda: self._fs.makedirs(target.rpartition("/")[0], exist_ok=True))
        self._request("written to", lambda: self._fs.cp_file(source, target))

    def _request(self, participle: str, request: Callable[[], Result]) -> Result:
        start, delay = time.monotonic(), FIRST_DELAY_S
        while True:
            try:
                return request()
            except Exception as error:  # each package of fsspec has errors of its own
                left_s = self.retry_for_s - (time.monotonic() - start)
                if isinstance(error, PERMANENT_ERRORS) or left_s <= 0:
                    raise _storage_error(self.url, participle, error) from error
                log.debug("%s cannot be %s yet (%s)", self.url, participle, _cause(error))
            time.sleep(min(delay, left_s))
            delay = min(2 * delay, LONGEST_DELAY_S)


def file_system_class(protocol: str) -> Any:
    """fsspec's class for a protocol. Raises StorageUnsupportedError, which says what to install."""
    import fsspec

    try:
        return fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        missing = error if error.name else error.__cause__
        package = getattr(missing, "name", None) or protocol
        install = "'.[s3]'" if package == "s3fs" else package
        raise StorageUnsupportedError(
            f"{protocol}:// needs the package {package}: pip install {install}"
        ) from error
    except ValueError as error:
        raise StorageUnsupportedError(
            f"{protocol}:// is no storage that fsspec knows; s3://, gs:// and abfs:// are"
        ) from error


def _open(url: str) -> tuple[Any, str]:
    """The file system of a URL and the path in it."""
    from fsspec.core import url_to_fs

    file_system_class(url.partition("://")[0])
    try:
        file_system, path = url_to_fs(url)
    except Exception as error:
        raise _storage_error(url, "opened", error) from error
    return file_system, path.rstrip("/")


def _storage_error(url: str, participle: str, error: BaseException) -> StorageError:
    return StorageError(errno.EIO, f"cannot be {participle} ({_cause(error)})", url)


def _cause(error: BaseException) -> str:
    """The type of an error and its first line, without passwords and signatures."""
    line = redact(first_line(error))
    return f"{type(error).__name__}: {line}"[:200] if line else type(error).__name__
