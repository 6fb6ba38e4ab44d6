"""The Ray actors: a pipeline stage and the data loader, each in a process of its own."""

from __future__ import annotations

import os
from pathlib import Path

from bim.orchestrator.data.loader import TrainBatches
from bim.orchestrator.data.spec import DataSpec
from bim.orchestrator.training.stage import Stage
from bim.orchestrator.training.transport import Payload


class StageActor(Stage):
    """A stage in a process of its own."""

    def ping(self) -> int:
        """Answers with its process id once the process is up."""
        return os.getpid()

    def sees(self, path: str) -> bool:
        """Whether a file that the driver wrote can be seen from here."""
        return Path(path).exists()


class LoaderActor:
    """The training batches in a process of their own."""

    def __init__(self, data: DataSpec) -> None:
        self._data = data
        self._batches: TrainBatches | None = None

    def ping(self) -> int:
        """Answers with its process id once the process is up."""
        return os.getpid()

    def open(self) -> int:
        """Open the data, anew if it was open: worker processes that died are back. Returns the steps per epoch."""
        self.close()
        self._batches = self._data.train_batches()
        return self._batches.steps_per_epoch

    def batch(self, step: int, micro: int) -> tuple[Payload, tuple[tuple[tuple[str, str], ...], float]]:
        """One micro-batch (uint8, for the stages) and what is told of it (bad images, seconds; for the driver)."""
        assert self._batches is not None, "open comes before the first batch"
        batch = self._batches.batch(step, micro)
        return Payload("uint8", batch.images), (batch.bad, batch.load_s)

    def close(self) -> None:
        """End the worker processes."""
        if self._batches is not None:
            self._batches.close()
        self._batches = None
