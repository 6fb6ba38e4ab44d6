"""The address of the MLflow store: how it is shown, whether it can be reached, how its pages are opened.

MLflow itself waits minutes for a server and up to an hour for a database that does not answer; here a wrong address is
an error within seconds, before anything starts.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import socket
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from bim.orchestrator.text import redact

try:
    import fcntl
except ImportError:  # without it, runs must not be started at the same moment in a new folder
    fcntl = None  # type: ignore[assignment]

CONNECT_TIMEOUT_S = 5.0
"""Seconds in which a store must be reachable at the start."""

RESPONSE_TIMEOUT_S = 60
"""Seconds that a server which is reachable may take for a request."""

LOCK_TIMEOUT_S = 60.0
"""Seconds that a process waits for another one that opens the same SQLite store; MLflow makes its tables in about 5 s."""


class TrackingError(ValueError):
    """The MLflow store cannot be used; raised only when a run starts."""


@dataclass(frozen=True)
class StoreAddress:
    """A resolved MLflow tracking URI."""

    uri: str

    def __str__(self) -> str:
        """The URI without passwords and tokens: fit for logs and files."""
        return redact(self.uri)

    @property
    def is_http(self) -> bool:
        return self.uri.startswith(("http://", "https://"))

    @property
    def sqlite_file(self) -> Path | None:
        """The database file if the store is SQLite."""
        path = self.uri.partition("sqlite:///")[2].partition("?")[0]
        return Path(unquote(path)).absolute() if path and path != ":memory:" else None

    @property
    def is_default(self) -> bool:
        """Whether MLflow uses this store in this folder by default."""
        return self.sqlite_file == Path("mlflow.db").absolute()

    def uri_to_set(self) -> str | None:
        """The tracking URI that a reader in this folder must set; None for MLflow's default."""
        return None if self.is_default else str(self)

    @property
    def shareable_uri(self) -> str:
        """The URI without its password, and with an absolute path if it is that of an SQLite store."""
        file = self.sqlite_file
        return str(self) if file is None else f"sqlite:///{quote(str(file))}"

    def artifact_folder(self, experiment: str) -> str | None:
        """Where a new experiment keeps its files; None leaves it to MLflow.

        MLflow puts the files of any SQLite store into `mlruns` of the working directory. For its default store that is
        beside the database; for another one it would scatter one store over every folder that a run was started in.
        """
        file = self.sqlite_file
        if file is None or self.is_default:
            return None
        return (file.parent / "mlruns" / re.sub(r"[^\w.-]+", "-", experiment)).as_uri()

    def ui_command(self) -> str | None:
        """The command that starts MLflow's pages; None if a server shows them already."""
        if self.is_http:
            return None
        return "mlflow ui" if self.is_default else f"mlflow ui --backend-store-uri '{self}'"

    def page(self, address: str) -> str:
        """The whole address of one of MLflow's pages, from that relative to the server."""
        server = str(self).rstrip("/") if self.is_http else "http://127.0.0.1:5000"
        return f"{server}/{address}"

    def probe(self, create: bool = True) -> None:
        """Connect to a store once, and write if it is SQLite.

        Args:
            create: whether an SQLite store that does not exist is created; MLflow itself would.

        Raises OSError, sqlite3.Error or an error of SQLAlchemy if it cannot be used.
        """
        file = self.sqlite_file
        if file is not None:
            if create:
                file.parent.mkdir(parents=True, exist_ok=True)
            elif not file.exists():
                raise FileNotFoundError(f"{file} does not exist")
            with contextlib.closing(sqlite3.connect(file, timeout=CONNECT_TIMEOUT_S)) as database:
                database.execute("BEGIN IMMEDIATE")
                database.execute("ROLLBACK")
            return
        parts = urlsplit(self.uri)
        default_ports = {"postgresql": 5432, "mysql": 3306, "mssql": 1433, "http": 80, "https": 443}
        port = parts.port or default_ports.get(parts.scheme.partition("+")[0])
        is_behind_proxy = self.is_http and bool(getproxies()) and not proxy_bypass(parts.hostname or "")
        if parts.hostname and port is not None and not is_behind_proxy:
            socket.create_connection((parts.hostname, port), timeout=CONNECT_TIMEOUT_S).close()
        if not self.is_http and parts.hostname:
            import sqlalchemy  # comes with mlflow; only databases on servers need it

            engine = sqlalchemy.create_engine(self.uri)
            try:
                engine.connect().close()
            finally:
                engine.dispose()


@contextlib.contextmanager
def exclusive_lock(address: StoreAddress) -> Iterator[None]:
    """Hold a lock that no other process of this machine holds for the same SQLite store.

    Several runs started at once in a new folder find no database, each makes MLflow's tables, and all but one fail
    ("table alembic_version already exists"). Stores on servers have been made by their server and need no lock.
    """
    file = address.sqlite_file
    if file is None or fcntl is None:
        yield
        return
    # Not the database itself: on file systems that emulate flock (NFS) the lock would collide with SQLite's own.
    name = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"mlflow-store-{os.getuid()}-{name}.lock"
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while time.monotonic() < deadline:  # a process that hangs does not stop the others for good
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
        yield
    finally:
        os.close(lock)  # releases the lock


class _HttpLimits:
    """The environment variables by which MLflow's HTTP client is limited, while anybody in this process asks for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._added: list[str] = []

    def enter(self, variables: Mapping[str, str]) -> None:
        with self._lock:
            self._holders += 1
            if self._holders == 1:
                self._added = [name for name in variables if name not in os.environ]
                os.environ.update({name: variables[name] for name in self._added})

    def exit(self) -> None:
        with self._lock:
            self._holders -= 1
            if self._holders == 0:
                for name in self._added:
                    os.environ.pop(name, None)


_http_limits = _HttpLimits()


@contextlib.contextmanager
def http_timeouts(retries: int, seconds: int) -> Iterator[None]:
    """Limit retries and seconds of MLflow's HTTP client, which also prints no addresses within the block.

    What the user has set in the environment stays, and of blocks that overlap, in several threads too, the first decides.
    MLflow reads these variables at every request and has no other interface for them.
    """
    _http_limits.enter(
        {
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries),
            "MLFLOW_HTTP_REQUEST_TIMEOUT": str(seconds),
            "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        }
    )
    try:
        yield
    finally:
        _http_limits.exit()


@contextlib.contextmanager
def quiet_client_logs() -> Iterator[None]:
    """Suppress the client's own logs of failed attempts, pages long each; the tracker logs one line."""

    def is_foreign(record: logging.LogRecord) -> bool:
        return "mlflow" not in f"{record.name} {record.getMessage()}"

    loggers = [logging.getLogger(name) for name in ("mlflow.store.db.utils", "urllib3.connectionpool")]
    for logger in loggers:
        logger.addFilter(is_foreign)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_foreign)


def summarize_error(error: BaseException, length: int = 160) -> str:
    """The cause in a few words, out of an error message that may be long and nested."""
    text = str(error).strip() or type(error).__name__
    causes = re.findall(r"\[Errno -?\d+\] ([^\"')\]]+)|Failed to resolve '[^']+'|timed out", text)
    if causes:
        return causes[-1].strip(" :") or ("timed out" if "timed out" in text else "unknown host name")
    if "Can't load plugin: sqlalchemy.dialects:" in text:
        return f"'{text.rpartition(':')[2]}' is no kind of store that MLflow knows"
    if "OperationalError) " in text:
        text = text.partition("OperationalError) ")[2]
    line = text.splitlines()[0]
    return line if len(line) <= length else line[: length - 3] + "..."
