"""A Ray of this process alone, on this machine: reachable from this machine only, by those who have its token.

`RAY_ADDRESS` is the way to a cluster of several machines; nothing here concerns it.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from bim.orchestrator.files import temporary_folder
from bim.orchestrator.signal_masks import blocked_in_children, kept_signal_handlers
from bim.orchestrator.text import first_line

OBJECT_STORE_FRACTION = 0.15  # of the free memory; the store holds the batches and activations in flight
OBJECT_STORE_MIN, OBJECT_STORE_MAX = 256 << 20, 8 << 30

START_ATTEMPTS = 2

DISCONNECT_TIMEOUT_S = 2.0
"""How long Ray's own end may take, and after it the end of its processes, before they are killed or left to the system."""

SOCKET_PATH_MAX = 107
"""Bytes of the path of a Unix socket on Linux; macOS takes 103."""

SOCKET_BELOW_TEMP = len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.4194304")
"""Characters that Ray puts behind its temporary directory."""

TOKEN_FILE = Path("~/.ray/auth_token")

PRIVATE_TEMP_PREFIX = "bim-ray-"

SHORT_PARENTS = ("/tmp", "/var/tmp", "/dev/shm")

log = logging.getLogger(__name__)


class ClusterError(ValueError):
    """The Ray cluster that `RAY_ADDRESS` names cannot be reached, or none can be started on this machine."""


def before_ray_is_imported(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set what Ray reads when it is imported, unless the user has set it; see `secure_local_ray`."""
    # Ray would print a paragraph for every stage that dies; the loop logs it in a line.
    environment.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed")
    secure_local_ray(environment)


def secure_local_ray(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set what Ray reads when it is imported: a Ray that this process starts listens on 127.0.0.1 and asks for a token.

    Does nothing for a cluster that `RAY_ADDRESS` names, where Ray is imported already, and where the user has set the mode.
    A token that exists is used; a new one lives as long as the process. (In `~/.ray/auth_token`, where Ray itself would put
    it, it would change how `ray start` behaves from then on.)
    """
    if environment.get("RAY_ADDRESS") or "ray" in sys.modules:
        return
    # On every system, in spite of its name: the address of a node is that of the loopback interface.
    environment.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    if environment.setdefault("RAY_AUTH_MODE", "token") != "token":
        return
    has_token = environment.get("RAY_AUTH_TOKEN") or environment.get("RAY_AUTH_TOKEN_PATH")
    if not has_token and not TOKEN_FILE.expanduser().exists():
        environment["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


@contextmanager
def short_temp_dir(environment: Mapping[str, str] = os.environ) -> Iterator[str | None]:
    """A directory for Ray's sockets and logs, removed at the end, where the usual one is too long or read-only; else None.

    Batch systems set TMPDIR to a path of the job, which easily is longer than a socket's may be.
    """
    usual = Path(environment.get("RAY_TMPDIR") or environment.get("TMPDIR") or "/tmp")
    limit = SOCKET_PATH_MAX if sys.platform == "linux" else SOCKET_PATH_MAX - 4
    fits = len(os.fsencode(usual / "ray")) + SOCKET_BELOW_TEMP <= limit
    if fits and os.access(usual, os.W_OK | os.X_OK):
        yield None
        return
    parent = next((one for one in SHORT_PARENTS if os.access(one, os.W_OK | os.X_OK)), None)
    if parent is None:
        yield None  # Ray itself says what is wrong
        return
    with temporary_folder(PRIVATE_TEMP_PREFIX, Path(parent)) as folder:
        log.debug("Ray's sockets and logs are in %s: %s is too long for them, or not writable", folder, usual)
        yield str(folder)


def start_error(error: BaseException, store_bytes: int) -> str:
    """Why Ray does not start on this machine, in a sentence with the remedy."""
    text = str(error)
    if "No space left on device" in text:
        reason, remedy = "the disk of its temporary directory is full", "free some space or set RAY_TMPDIR"
    elif "AF_UNIX path length" in text:
        reason, remedy = (
            "its temporary directory has too long a path for a socket",
            "set RAY_TMPDIR to a short one",
        )
    elif re.search(r"[Pp]ermission denied|[Rr]ead-only file system", text):
        reason, remedy = "its temporary directory may not be written to", "set RAY_TMPDIR to one that may"
    elif re.search(r"[Aa]ddress already in use|[Nn]o (free|available) port|[Ff]ailed to bind", text):
        reason, remedy = "it finds no free port", "end other programs, or jobs of Ray, on this machine"
    elif isinstance(error, MemoryError) or re.search(r"[Cc]annot allocate memory|memory", text):
        reason = f"there is too little memory (its object store alone takes {store_bytes >> 20} MB)"
        remedy = "end other programs"
    elif re.search(r"[Tt]oo many open files|Resource temporarily unavailable|can't start new thread", text):
        reason, remedy = (
            "a limit on open files or processes is reached",
            "raise it with ulimit -n or ulimit -u",
        )
    else:
        line = first_line(error) or type(error).__name__
        reason, remedy = line[:200].rstrip(". "), "see Ray's logs in its temporary directory"
    return f"Ray does not start on this machine: {reason}; {remedy}, or train without Ray: --placement.backend in_process"


@contextmanager
def local_ray() -> Iterator[None]:
    """A Ray of this process, started and connected; its processes are gone at the end.

    Raises:
        ClusterError: it does not start.
    """
    import ray

    driver = psutil.Process()
    others = {child.pid for child in driver.children()}
    daemons: list[psutil.Process] | None = None  # processes that the user starts later are none of Ray's
    free = psutil.virtual_memory().available
    store_bytes = int(min(OBJECT_STORE_MAX, max(OBJECT_STORE_MIN, free * OBJECT_STORE_FRACTION)))
    with short_temp_dir() as temp_dir:
        options = {} if temp_dir is None else {"_temp_dir": temp_dir}
        try:
            for attempts_left in reversed(range(START_ATTEMPTS)):
                try:
                    with kept_signal_handlers(), blocked_in_children():
                        ray.init(
                            address="local",
                            include_dashboard=False,
                            object_store_memory=store_bytes,
                            log_to_driver=False,
                            logging_level=logging.ERROR,
                            **options,
                        )
                    break
                except Exception as error:
                    # Ray gives its own daemons 30 seconds, which a busy machine or a cold file system exceeds.
                    if not attempts_left or "timed out during startup" not in str(error):
                        raise ClusterError(start_error(error, store_bytes)) from error
                    log.info("Ray is slow to start on this machine; starting it again")
                    _end(_started(driver, others))
            daemons = _started(driver, others)
            yield
        finally:
            _end(_started(driver, others) if daemons is None else daemons)


def _started(driver: psutil.Process, others: Collection[int]) -> list[psutil.Process]:
    """The processes that this one has started beside `others`."""
    return [child for child in driver.children() if child.pid not in others]


def _end(daemons: list[psutil.Process]) -> None:
    """Disconnect, and kill what Ray started: its daemons do not see SIGTERM, and `ray.shutdown` waits a second for each."""
    import ray

    process_tree = daemons + [process for daemon in daemons for process in _below(daemon)]

    def kill() -> None:
        end = time.monotonic() + DISCONNECT_TIMEOUT_S
        while ray.is_initialized() and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(DISCONNECT_TIMEOUT_S / 10)  # until the driver's own part of Ray has ended
        for process in process_tree:
            with suppress(psutil.Error):
                process.kill()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    try:
        ray.shutdown()
    finally:
        killer.join()
        psutil.wait_procs(process_tree, timeout=DISCONNECT_TIMEOUT_S)


def _below(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.Error:
        return []
