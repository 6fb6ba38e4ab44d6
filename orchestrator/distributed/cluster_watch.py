"""A thread that notices when the head of the Ray cluster, or Ray on this machine, is gone.

Ray itself ends the driver's process without a message 60 seconds after it lost the head. The watch is faster: the loop
sees `lost` and ends with a sentence; where no loop runs, the watch logs the sentence and ends the process.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
from collections.abc import Callable, Mapping

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0

INTERVAL_S = 2.0

FAILED_PROBES = 3
"""Probes in a row that must fail: a single one can be lost on a loaded machine."""

GRACE_S = 40.0
"""How long an orderly end may take after the loss; with the probes it is less than the 60 seconds of Ray."""


class ClusterWatch:
    """Probes addresses once every `interval_s`.

    Args:
        addresses: what is at an address, for the message -> HOST:PORT.
        probe: whether something listens at an address.
        end_process: called `grace_s` after the loss, unless the watch was stopped.
    """

    def __init__(
        self,
        addresses: Mapping[str, str],
        probe: Callable[[str], bool] | None = None,
        end_process: Callable[[], None] | None = None,
        interval_s: float = INTERVAL_S,
        grace_s: float = GRACE_S,
    ) -> None:
        self.lost: str | None = None
        """What is gone, for a message; None while everything answers."""
        self._addresses = dict(addresses)
        self._probe, self._end_process = probe or is_reachable, end_process or _exit
        self._interval_s, self._grace_s = interval_s, grace_s
        self._failed = dict.fromkeys(self._addresses, 0)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cluster-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread; the process is not ended any more."""
        self._stopped.set()

    def look(self) -> None:
        """Probe every address once."""
        for name, address in self._addresses.items():
            self._failed[name] = 0 if self._probe(address) else self._failed[name] + 1
            if self._failed[name] >= FAILED_PROBES:
                self.lost = f"{name} at {address}"

    @property
    def sentence(self) -> str:
        """The message for the user after a loss."""
        return f"{self.lost} is lost; start Ray again if it is yours, and continue with --resume"

    def _run(self) -> None:
        while self.lost is None:
            if self._stopped.wait(self._interval_s):
                return
            self.look()
        if not self._stopped.wait(self._grace_s):
            log.error("%s", self.sentence)
            self._end_process()


def is_reachable(address: str) -> bool:
    """Whether a process listens at HOST:PORT; waits at most `CONNECT_TIMEOUT_S`."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def _exit() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(1)
