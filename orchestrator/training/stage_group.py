"""The interface through which the loop drives a stage group, and the stage group in this process.

`InProcessStages` serves tests and single-GPU runs without Ray, and is the reference that the Ray stage group equals bit
for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from bim.orchestrator.data.loader import Batch
from bim.orchestrator.training.errors import StageFailure
from bim.orchestrator.training.manifest import FileRecord
from bim.orchestrator.training.messages import StepReport, StepRequest
from bim.orchestrator.training.spec import PretrainSpec
from bim.orchestrator.training.stage import Stage
from bim.orchestrator.training.storage import Location
from bim.orchestrator.training.transport import Payload


class Loader(Protocol):
    """Source of micro-batches, indexed by step; `bim.orchestrator.data.loader.TrainBatches` implements it."""

    def batch(self, step: int, micro_step: int = 0, /) -> Batch: ...

    def close(self) -> None: ...


class Stages(Protocol):
    """A stage group, driven by references: requests run in the order of submission, reports are collected later."""

    stage_blocks: tuple[tuple[int, ...], ...]
    """The blocks of each stage."""

    def start(self) -> None:
        """Create every stage that does not exist, at first or after a failure."""

    def restore(self, checkpoint: Location | None, step: int) -> None:
        """Set every stage to the state before `step`: from a checkpoint, or as built from the seed."""

    def submit(self, request: StepRequest) -> Any:
        """Start one micro-batch in all stages. Returns a reference for `wait`; does not block."""

    def wait(self, pending: Any) -> StepReport:
        """Wait for one submitted micro-batch. Raises StageFailure, or a TrainingError of a stage."""

    def cancel_pending(self, pending: Sequence[Any]) -> None:
        """After a failure: wait until no submitted micro-batch is running."""

    def save(self, checkpoint: Location) -> tuple[FileRecord, ...]:
        """Save all stages. Only while no micro-batch is in flight."""

    def close(self) -> None:
        """End all stages and free their resources."""


def stage_label(index: int, blocks: Sequence[int]) -> str:
    """The name of a stage in messages: "stage 2 (blocks 4-5)"."""
    named = f"block {blocks[0]}" if len(blocks) == 1 else f"blocks {blocks[0]}-{blocks[-1]}"
    return f"stage {index} ({named})"


class InProcessStages:
    """A stage group in this process: stages run one after the other and exchange the same payloads as on Ray.

    Args:
        open_loader: opens the data; called again at every rewind.
        stage_blocks: the blocks of each stage, e.g. ((0,), (1,), (2,), (3,)).
    """

    def __init__(
        self,
        spec: PretrainSpec,
        open_loader: Callable[[], Loader],
        stage_blocks: Sequence[Sequence[int]],
        device: str = "cpu",
        threads: int | None = None,
    ) -> None:
        self.stage_blocks = tuple(tuple(blocks) for blocks in stage_blocks)
        self._open_loader = open_loader
        self._loader: Loader | None = None
        self._stages = [Stage(spec, blocks, device, threads) for blocks in self.stage_blocks]

    def start(self) -> None:
        """Nothing to do: the constructor created the stages."""

    def restore(self, checkpoint: Location | None, step: int) -> None:
        self.close()
        self._loader = self._open_loader()
        for stage in self._stages:
            stage.restore(None if checkpoint is None else str(checkpoint), step)

    def submit(self, request: StepRequest) -> StepReport | BaseException:
        """Run the micro-batch at once; an error is returned and raised by `wait`, as for a remote stage."""
        assert self._loader is not None, "call restore before the first step"
        index = -1
        try:
            batch = self._loader.batch(request.step, request.micro_step)
            images = Payload("uint8", batch.images)
            payload: Payload | None = None
            reports = []
            for index, stage in enumerate(self._stages):  # noqa: B007 (the error names the failing stage)
                payload, report = stage.train_step(request, images, payload)
                reports.append(report)
        except Exception as error:
            component = "the data loader" if index < 0 else stage_label(index, self.stage_blocks[index])
            return StageFailure(component, f"at step {request.step}", error, process_lost=False)
        return StepReport(request, tuple(reports), batch.bad, batch.load_s, data_wait_s=batch.load_s)

    def wait(self, pending: StepReport | BaseException) -> StepReport:
        if isinstance(pending, BaseException):
            raise pending
        return pending

    def cancel_pending(self, pending: Sequence[Any]) -> None:
        """Nothing to wait for: `submit` runs each micro-batch to its end."""

    def save(self, checkpoint: Location) -> tuple[FileRecord, ...]:
        return tuple(record for stage in self._stages for record in stage.save(str(checkpoint)))

    def weights(self) -> dict[int, dict[str, Tensor]]:
        """Weights of every block, for comparisons."""
        return {k: w for stage in self._stages for k, w in stage.weights().items()}

    def close(self) -> None:
        if self._loader is not None:
            self._loader.close()
        self._loader = None
