"""The interface through which the loop drives a stage group, and the stage group in this process.

`InProcessStages` serves tests and single-GPU runs without Ray, and is the reference that the Ray stage group equals bit
for bit.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor

from bim.orchestrator.data.loader import Batch
from bim.orchestrator.training.device_errors import breaks_device_context
from bim.orchestrator.training.errors import DeviceMemoryError, StageFailure, TrainingError
from bim.orchestrator.training.messages import SavedBlocks, StepReport, StepRequest
from bim.orchestrator.training.spec import PretrainSpec
from bim.orchestrator.training.stage import Stage, blocks_label
from bim.orchestrator.training.storage import Location
from bim.orchestrator.training.transport import Payload
from bim.orchestrator.training.watchdog import LOADER


class Loader(Protocol):
    """Source of micro-batches, indexed by step; `bim.orchestrator.data.loader.TrainBatches` implements it."""

    def batch(self, step: int, micro_step: int = 0, /) -> Batch: ...

    def close(self) -> None: ...


Result = TypeVar("Result")

ShouldGiveUp = Callable[[], bool]
"""Asked while something is waited for; the wait then raises `Interrupted`."""


class Stages(Protocol):
    """A stage group, driven by references: requests run in the order of submission, reports are collected later."""

    stage_blocks: tuple[tuple[int, ...], ...]
    """The blocks of each stage."""

    def start(self, should_give_up: ShouldGiveUp) -> None:
        """Create every stage that does not exist, at first or after a failure, and replace those that are broken."""

    def restore(self, checkpoint: Location | None, step: int, should_give_up: ShouldGiveUp) -> None:
        """Set every stage to the state before `step`: from a checkpoint, or as built from the seed."""

    def submit(self, request: StepRequest) -> Any:
        """Start one micro-batch in all stages. Returns a reference for `wait`; does not block."""

    def wait(self, pending: Any, timeout_s: float) -> StepReport | None:
        """Wait for one submitted micro-batch; None if it is not done in time.

        Raises StageFailure, or a TrainingError of a stage.
        """

    def awaited(self, pending: Any) -> int:
        """The component that a micro-batch waits for: `LOADER`, or the number of a stage."""

    def kill(self, component: int) -> None:
        """End a hung component (`LOADER`, or a stage's number) by force; `start` creates it again."""

    def cancel_pending(self, pending: Sequence[Any], should_give_up: ShouldGiveUp) -> None:
        """After a failure: wait until no submitted micro-batch is running, or `should_give_up`; does not raise."""

    def save(self, checkpoint: Location, should_give_up: ShouldGiveUp) -> None:
        """Let all stages copy their state and write it in the background. Only while no micro-batch is in flight."""

    def flush(self, should_give_up: ShouldGiveUp) -> tuple[tuple[SavedBlocks, ...], ...]:
        """Wait until all checkpoints are written; for every stage those that no report contained."""

    def call(self, function: Callable[[], Result]) -> list[Result]:
        """The result of `function()` in the process of every stage, first stage first. Raises StageFailure."""

    def close(self) -> None:
        """End all stages and free their resources."""


def stage_label(index: int, blocks: Sequence[int]) -> str:
    """The name of a stage in messages: "stage 2 (blocks 4-5)"."""
    return f"stage {index} ({blocks_label(blocks)})"


def component_label(component: int, stage_blocks: Sequence[Sequence[int]]) -> str:
    """The name of `LOADER` or of a stage in messages."""
    return "the data loader" if component == LOADER else stage_label(component, stage_blocks[component])


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
        self._broken: StageFailure | None = None
        self._stages = [Stage(spec, blocks, device, threads) for blocks in self.stage_blocks]

    def start(self, should_give_up: ShouldGiveUp) -> None:
        """Nothing to do: the constructor created the stages.

        Raises:
            TrainingError: a device answers no more, and a process cannot replace itself.
        """
        if self._broken is not None and isinstance(self._broken.cause, DeviceMemoryError):
            raise TrainingError(str(self._broken)) from self._broken  # it says what would fit
        if self._broken is not None:
            raise TrainingError(
                f"{self._broken}; the device answers this process no more: start again with --resume, or let "
                "placement.backend ray replace the process of a stage"
            ) from self._broken

    def restore(self, checkpoint: Location | None, step: int, should_give_up: ShouldGiveUp) -> None:
        self.close()
        self._loader = self._open_loader()
        for component, stage in enumerate(self._stages):
            try:
                stage.restore(None if checkpoint is None else str(checkpoint), step)
            except Exception as error:
                if not breaks_device_context(error):
                    raise
                raise self._failure(component, "while restoring", error, None) from error

    def submit(self, request: StepRequest) -> StepReport | BaseException:
        """Run the micro-batch at once; an error is returned and raised by `wait`, as for a remote stage."""
        assert self._loader is not None, "call restore before the first step"
        component = LOADER
        try:
            batch = self._loader.batch(request.step, request.micro_step)
            images = Payload("uint8", batch.images)
            payload: Payload | None = None
            reports = []
            for component, stage in enumerate(self._stages):  # noqa: B007 (the error names the failing stage)
                payload, report = stage.train_step(request, images, payload)
                reports.append(report)
        except Exception as error:
            return self._failure(component, f"at step {request.step}", error, request.step)
        return StepReport(request, tuple(reports), batch.bad, batch.load_s, data_wait_s=batch.load_s)

    def _failure(self, component: int, context: str, error: Exception, step: int | None) -> StageFailure:
        label = component_label(component, self.stage_blocks)
        details = "".join(traceback.format_exception(error))
        failure = StageFailure(label, context, error, process_lost=False, step=step, details=details)
        if breaks_device_context(error):
            self._broken = failure
        return failure

    def wait(self, pending: StepReport | BaseException, timeout_s: float) -> StepReport:
        if isinstance(pending, BaseException):
            raise pending
        return pending

    def awaited(self, pending: Any) -> int:
        return LOADER

    def kill(self, component: int) -> None:
        """A part of this process cannot be ended alone."""

    def cancel_pending(self, pending: Sequence[Any], should_give_up: ShouldGiveUp) -> None:
        """Nothing to wait for: `submit` runs each micro-batch to its end."""

    def save(self, checkpoint: Location, should_give_up: ShouldGiveUp) -> None:
        for stage in self._stages:
            stage.save(str(checkpoint))

    def flush(self, should_give_up: ShouldGiveUp) -> tuple[tuple[SavedBlocks, ...], ...]:
        saved = []
        for index, stage in enumerate(self._stages):
            try:
                saved.append(stage.flush())
            except Exception as error:
                raise self._failure(index, "while saving", error, None) from error
        return tuple(saved)

    def call(self, function: Callable[[], Result]) -> list[Result]:
        return [function() for _ in self._stages]

    def weights(self) -> dict[int, dict[str, Tensor]]:
        """Weights of every block, for comparisons."""
        return {k: w for stage in self._stages for k, w in stage.weights().items()}

    def close(self) -> None:
        if self._loader is not None:
            self._loader.close()
        self._loader = None
