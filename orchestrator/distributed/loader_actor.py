"""The Ray actor that loads the training batches; it starts in half the time of a stage, since it imports no timm."""

from __future__ import annotations

from bim.orchestrator.data.loader import TrainBatches
from bim.orchestrator.data.spec import DataSpec
from bim.orchestrator.distributed.actors import ProcessActor
from bim.orchestrator.training.transport import Payload


class LoaderActor(ProcessActor):
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
