"""The Ray actors: a pipeline stage and the data loader, each in a process of its own."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import psutil
import ray

from bim.orchestrator.data.loader import TrainBatches
from bim.orchestrator.data.spec import DataSpec
from bim.orchestrator.training.stage import Stage
from bim.orchestrator.training.storage import exists
from bim.orchestrator.training.transport import Payload

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


class _Actor:
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


class StageActor(_Actor, Stage):
    """A stage in its own process."""

    def path_exists(self, path: str) -> bool:
        """Whether a file of the driver, by its path or URL, is visible on this node."""
        return exists(path)


class LoaderActor(_Actor):
    """The training batches in their own process."""

    def __init__(self, data: DataSpec) -> None:
        self._data = data
        self._batches: TrainBatches | None = None

    def open(self) -> int:
        """Open the data, with new worker processes if it was open. Returns the steps per epoch."""
        self.close()
        self._batches = self._data.train_batches()
        return self._batches.steps_per_epoch

    def batch(self, step: int, micro_step: int) -> tuple[Payload, tuple[tuple[tuple[str, str], ...], float]]:
        """One micro-batch, uint8, for the stages; and (bad images, seconds of loading) for the driver."""
        assert self._batches is not None, "call open before the first batch"
        batch = self._batches.batch(step, micro_step)
        return Payload("uint8", batch.images), (batch.bad, batch.load_s)

    def close(self) -> None:
        """End the worker processes."""
        if self._batches is not None:
            self._batches.close()
        self._batches = None
