"""What the Ray actors of a run have in common: where their process lives, and calls in it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import psutil
import ray

Result = TypeVar("Result")


@dataclass(frozen=True)
class ActorProcess:
    """Where an actor lives.

    Args:
        start_time: of the process, seconds since the epoch; with the pid it names one process.
        node_id: Ray's hexadecimal id of the node.
        address: of the node, "10.0.0.3 (gpu-worker-2)".
        log: the file on the node that has the standard error of the process; None if unknown.
    """

    pid: int
    start_time: float
    node_id: str
    address: str
    log: str | None


class ProcessActor:
    """What the actors of a run have in common."""

    def ping(self) -> ActorProcess:
        """Where this actor lives; returns once the process is up."""
        ip, host = ray.util.get_node_ip_address(), socket.gethostname()
        try:
            log: str | None = os.readlink("/proc/self/fd/2")
        except OSError:  # not on Linux
            log = None
        pid = os.getpid()
        node_id = ray.get_runtime_context().get_node_id()
        return ActorProcess(pid, psutil.Process(pid).create_time(), node_id, f"{ip} ({host})", log)

    def call(self, function: Callable[[], Result]) -> Result:
        """The result of `function()` in this process."""
        return function()
