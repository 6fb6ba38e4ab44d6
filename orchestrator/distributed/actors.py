"""The Ray actors: a pipeline stage and the data loader, each in a process of its own."""

from __future__ import annotations

import os

from bim.orchestrator.data.loader import TrainBatches
from bim.orchestrator.data.spec import DataSpec
from bim.orchestrator.training.stage import Stage
from bim.orchestrator.training.storage import exists
from bim.orchestrator.training.transport import Payload


class StageActor(Stage):
    """A stage in its own process."""

    def ping(self) -> int:
        """The process id; returns once the process is up."""
        return os.getpid()

    def path_exists(self, path: str) -> bool:
        """Whether a file of the driver, by its path or URL, is visible on this node."""
        return exists(path)


class LoaderActor:
    """The training batches in their own process."""

    def __init__(self, data: DataSpec) -> None:
        self._data = data
        self._batches: TrainBatches | None = None

    def ping(self) -> int:
        """The process id; returns once the process is up."""
        return os.getpid()

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
