"""Doubles of stages for the training loop, and a run of the loop over them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bim.orchestrator.data.phases import constant
from bim.orchestrator.files import atomic_write
from bim.orchestrator.training.callbacks import EpochReport, NullCallback, PretrainResult, StopRequest
from bim.orchestrator.training.checkpoint import CheckpointStore
from bim.orchestrator.training.errors import StageFailure
from bim.orchestrator.training.loop import pretrain
from bim.orchestrator.training.manifest import FileRecord, Manifest
from bim.orchestrator.training.messages import SavedBlocks, StageReport, StepReport, StepRequest
from bim.orchestrator.training.restart_policy import RestartPolicy
from bim.orchestrator.training.schedule import TrainingSchedule
from bim.orchestrator.training.stage_group import ShouldGiveUp


class StubStages:
    """What every double of two stages needs; a subclass restores, submits and flushes."""

    stage_blocks = ((0,), (1,))

    def start(self, should_give_up: ShouldGiveUp) -> None: ...

    def wait(self, pending: Any, timeout_s: float) -> StepReport | None:
        if isinstance(pending, BaseException):
            raise pending
        return pending

    def awaited(self, pending: Any) -> int:
        return 0

    def kill(self, component: int) -> None: ...

    def cancel_pending(self, pending: Sequence[Any], should_give_up: ShouldGiveUp) -> None: ...

    def close(self) -> None: ...


class CountingStages(StubStages):
    """Two stages whose state is the number of their updates; each step in `failures` fails once."""

    def __init__(self, failures: dict[int, BaseException] | None = None) -> None:
        self.failures = dict(failures or {})
        self.updates = 0
        self.requests: list[StepRequest] = []
        self.restores: list[int] = []
        self.max_in_flight = 0
        self._in_flight = 0
        self._written: tuple[tuple[str, tuple[FileRecord, ...]], ...] = ()
        self.bad: dict[int, tuple[tuple[str, str], ...]] = {}

    def restore(self, checkpoint: Path | None, step: int, should_give_up: ShouldGiveUp) -> None:
        self._written = ()
        self.updates = 0 if checkpoint is None else int((checkpoint / "updates").read_text())
        self.restores.append(step)

    def submit(self, request: StepRequest) -> Any:
        self._in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self._in_flight)
        if request.step in self.failures:
            return StageFailure(
                "stage 1 (block 1)",
                f"at step {request.step}",
                self.failures.pop(request.step),
                process_lost=False,
                step=request.step,
            )
        self.requests.append(request)
        if request.is_last_micro_step:
            self.updates += 1
            if request.checkpoint:
                self.write(request.checkpoint)
        losses = {0: {"loss": 1.0 / (request.step + 1)}, 1: {"loss": 2.0}}
        saved = self.flush(lambda: False)
        reports = tuple(StageReport({k: losses[k]}, saved[k], 0.01, 0.0) for k in losses)
        return StepReport(request, reports, self.bad.get(request.step, ()), 0.0, 0.0)

    def wait(self, pending: Any, timeout_s: float) -> StepReport | None:
        self._in_flight -= 1
        return super().wait(pending, timeout_s)

    def cancel_pending(self, pending: Sequence[Any], should_give_up: ShouldGiveUp) -> None:
        self._in_flight = 0

    def save(self, checkpoint: Path, should_give_up: ShouldGiveUp) -> None:
        self.write(str(checkpoint))

    def write(self, checkpoint: str) -> None:
        folder, text = Path(checkpoint), str(self.updates)
        folder.mkdir(parents=True, exist_ok=True)
        files = []
        for name in ("updates", "copy"):
            atomic_write(folder / name, text)
            files.append(FileRecord(name, len(text), zlib.crc32(text.encode())))
        self._written = (*self._written, (checkpoint, tuple(files)))

    def flush(self, should_give_up: ShouldGiveUp) -> tuple[tuple[SavedBlocks, ...], ...]:
        written, self._written = self._written, ()
        return tuple(
            tuple(SavedBlocks(folder, files[k : k + 1]) for folder, files in written) for k in (0, 1)
        )


class Recorder(NullCallback):
    def __init__(self) -> None:
        self.epochs: list[EpochReport] = []
        self.steps: list[int] = []
        self.rewinds: list[int] = []
        self.checkpoints: list[int] = []

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        self.steps.append(step)

    def on_epoch(self, report: EpochReport) -> None:
        self.epochs.append(report)

    def on_checkpoint(self, step: int) -> None:
        self.checkpoints.append(step)

    def on_rewind(self, step: int) -> None:
        self.rewinds.append(step)


def schedule(**changes: Any) -> TrainingSchedule:
    settings: dict[str, Any] = {
        "epochs": 3,
        "phases": constant(5, 8),
        "lr": lambda step: 0.1,
        "window": 4,
        "checkpoint_epochs": 4 / 5,
        "max_bad_images": 1,
    }
    return TrainingSchedule(**(settings | changes))


def run(
    stages: CountingStages,
    out: Path,
    recorder: Recorder | None = None,
    stop: StopRequest | None = None,
    **changes: Any,
) -> PretrainResult:
    max_restarts, watchdog = changes.pop("max_restarts", 3), changes.pop("watchdog", None)
    return pretrain(
        schedule(**changes),
        stages,
        CheckpointStore(out),
        lambda step: Manifest(step, 5, {}, {}, ()),
        recorder or Recorder(),
        RestartPolicy(max_restarts, backoff_s=0.01),
        stop or StopRequest(),
        watchdog,
    )
