"""Stages: places where consecutive blocks live, and the interface through which the loop drives a group of them.

`Stage` is a plain synchronous class; Ray is put on where it is created (`ray_stages.py`). `InProcessStages` runs a group in
this process: for tests, for one GPU without Ray, and as the oracle that the Ray group must equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from bim.orchestrator.data.loader import Batch
from bim.orchestrator.training.checkpoint import FileRecord
from bim.orchestrator.training.errors import StageFailure
from bim.orchestrator.training.messages import StepReport, StepRequest
from bim.orchestrator.training.spec import PretrainSpec
from bim.orchestrator.training.stage import Stage
from bim.orchestrator.training.transport import Payload


class Loader(Protocol):
    """Where micro-batches come from, indexed by step; `bim.orchestrator.data.loader.TrainBatches` is one."""

    def batch(self, step: int, micro: int = 0) -> Batch: ...

    def close(self) -> None: ...


class Stages(Protocol):
    """A group of stages, driven by references: what is submitted runs in order; what it said is collected later."""

    places: tuple[tuple[int, ...], ...]
    """The blocks of each stage."""

    def start(self) -> None:
        """Make every place that is not there, first time or after a failure."""

    def restore(self, checkpoint: Path | None, step: int) -> None:
        """Bring every stage to the state before `step`: from a checkpoint, or as built from the seed."""

    def submit(self, order: StepRequest) -> Any:
        """Send one micro-batch down the pipe. Returns a reference for `settle`; does not wait."""

    def settle(self, pending: Any) -> StepReport:
        """Wait for one submitted micro-batch. Raises StageFailure, or a TrainingError of a stage."""

    def cancel_pending(self, pending: Sequence[Any]) -> None:
        """After a failure: wait until nothing of what was submitted is running any more."""

    def save(self, checkpoint: Path) -> tuple[FileRecord, ...]:
        """With nothing under way: every stage saves."""

    def close(self) -> None:
        """End all places and free what they held."""


def stage_label(index: int, blocks: Sequence[int]) -> str:
    """How messages name a stage."""
    named = f"block {blocks[0]}" if len(blocks) == 1 else f"blocks {blocks[0]}-{blocks[-1]}"
    return f"stage {index} ({named})"


class InProcessStages:
    """A group of stages in this process, run one after the other through the same wire format.

    Args:
        open_loader: opens the data, here and again at every rewind.
        places: the blocks of each stage, e.g. ((0,), (1,), (2,), (3,)).
    """

    def __init__(
        self,
        spec: PretrainSpec,
        open_loader: Callable[[], Loader],
        places: Sequence[Sequence[int]],
        device: str = "cpu",
        threads: int | None = None,
    ) -> None:
        self.places = tuple(tuple(p) for p in places)
        self._open_loader = open_loader
        self._loader: Loader | None = None
        self._stages = [Stage(spec, blocks, device, threads) for blocks in self.places]

    def start(self) -> None:
        """Nothing to make: the stages were built with the group."""

    def restore(self, checkpoint: Path | None, step: int) -> None:
        self.close()
        self._loader = self._open_loader()
        for stage in self._stages:
            stage.restore(None if checkpoint is None else str(checkpoint), step)

    def submit(self, order: StepRequest) -> StepReport | BaseException:
        """Run the micro-batch at once; an error is kept for `settle`, as a remote stage would keep it."""
        assert self._loader is not None, "restore comes before the first step"
        index = -1
        try:
            batch = self._loader.batch(order.step, order.micro)
            images = Payload("uint8", batch.images)
            payload: Payload | None = None
            reports = []
            for index, stage in enumerate(self._stages):  # noqa: B007 (the failing stage is named below)
                payload, report = stage.train_step(order, images, payload)
                reports.append(report)
        except Exception as error:
            place = "the data loader" if index < 0 else stage_label(index, self.places[index])
            return StageFailure(place, f"at step {order.step}", error, died=False)
        return StepReport(order, tuple(reports), batch.bad, batch.load_s, data_wait_s=batch.load_s)

    def settle(self, pending: StepReport | BaseException) -> StepReport:
        if isinstance(pending, BaseException):
            raise pending
        return pending

    def cancel_pending(self, pending: Sequence[Any]) -> None:
        """Nothing runs behind the caller's back here."""

    def save(self, checkpoint: Path) -> tuple[FileRecord, ...]:
        return tuple(record for stage in self._stages for record in stage.save(str(checkpoint)))

    def weights(self) -> dict[int, dict[str, Tensor]]:
        """Weights of every block, for comparisons."""
        return {k: w for stage in self._stages for k, w in stage.weights().items()}

    def close(self) -> None:
        if self._loader is not None:
            self._loader.close()
        self._loader = None
