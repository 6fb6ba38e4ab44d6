"""How much of a stage's time the pipeline itself costs: the real loop and the real actors around stages that only sleep.

Sleeping stages show it on a machine with fewer cores than stages. Serves `pipelines/benchmark.py pipeline`.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bim.orchestrator.data.phases import constant
from bim.orchestrator.distributed.actors import LoaderActor, StageActor
from bim.orchestrator.distributed.placement import StageLayout, consecutive
from bim.orchestrator.distributed.ray_stage_group import RayStages
from bim.orchestrator.training.callbacks import EpochReport, StopRequest
from bim.orchestrator.training.checkpoint import CheckpointStore, FileRecord, Manifest
from bim.orchestrator.training.loop import TrainingSchedule, pretrain
from bim.orchestrator.training.messages import StageReport, StepRequest
from bim.orchestrator.training.restart_policy import RestartPolicy
from bim.orchestrator.training.transport import Payload, ReceiveBuffer


@dataclass(frozen=True)
class SleepSpec:
    """Stages that sleep for `work_s` seconds and hand on `payload_bytes`."""

    stages: int
    work_s: float
    payload_bytes: int


class SleepStage(StageActor):
    """Takes what a real stage takes, copies it in as a real stage does, sleeps instead of training."""

    def __init__(self, spec: SleepSpec, blocks: tuple[int, ...], device: str, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._sleep = spec
        self._last = blocks[-1] == spec.stages - 1
        self._inbox = ReceiveBuffer(torch.device(device))
        self._out = np.zeros(spec.payload_bytes // 4, dtype=np.float32)

    def restore(self, checkpoint: str | None, step: int) -> int:
        return step

    def train_step(
        self, order: StepRequest, images: Payload, incoming: Payload | None
    ) -> tuple[Payload | None, StageReport]:
        started = time.perf_counter()
        self._inbox.unpack("images", images)
        if incoming is not None:
            self._inbox.unpack("tokens", incoming)
        time.sleep(self._sleep.work_s)
        report = StageReport({0: {"loss": 0.0}}, (), time.perf_counter() - started, 0.0)
        return None if self._last else Payload("float32", self._out), report

    def save(self, checkpoint: str) -> tuple[FileRecord, ...]:
        return ()


class SleepLoader(LoaderActor):
    """Hands out a small batch at once."""

    def __init__(self, data: object) -> None:
        self._images = np.zeros((64, 3, 32, 32), dtype=np.uint8)

    def batch(self, step: int, micro: int) -> tuple[Payload, tuple[tuple[tuple[str, str], ...], float]]:
        return Payload("uint8", self._images), ((), 0.0)

    def open(self) -> int:
        return 1

    def close(self) -> None: ...


class SleepStages(RayStages):
    """The real group with sleeping stages in it."""

    stage_class = SleepStage
    loader_class = SleepLoader


class _Silence:
    def on_step(self, step: int, metrics: dict[str, float]) -> None: ...

    def on_epoch(self, report: EpochReport) -> None: ...

    def on_checkpoint(self, step: int) -> None: ...

    def on_rewind(self, step: int) -> None: ...

    def say(self, text: str) -> None: ...


@dataclass(frozen=True)
class PipelineSpeed:
    """One measurement.

    share: steps/s of the pipeline as a share of one such stage alone, filling and draining left out.
    driver_ms: the driver's CPU time per step and stage, milliseconds.
    """

    share: float
    steps_per_s: float
    driver_ms: float


def alone_steps_per_s(work_s: float, steps: int) -> float:
    """What one stage does when nothing is around it: the same sleep in a bare loop."""
    started = time.perf_counter()
    for _ in range(steps):
        time.sleep(work_s)
    return steps / (time.perf_counter() - started)


def pipeline_speed(stages: int, work_s: float, payload_bytes: int, steps: int, cpus: float) -> PipelineSpeed:
    """Run `steps` steps through `stages` sleeping stages with the real loop. Ray must be initialised."""
    alone = alone_steps_per_s(work_s, 100)
    share = cpus / (stages + 1)
    layout = StageLayout(consecutive(stages, stages), 0.0, share, share, threads=1)
    with tempfile.TemporaryDirectory() as out:
        group = SleepStages(SleepSpec(stages, work_s, payload_bytes), None, layout, Path(out))  # type: ignore[arg-type]
        try:
            _drive(group, Path(out), 50)  # warm: connections, buffers, the object store's first pages
            marks: list[tuple[float, float]] = []
            _drive(group, Path(out) / "timed", steps, marks)
        finally:
            group.close()
    # The first and last steps fill and drain the pipe; the settled steps between them are its steady pace.
    (t0, cpu0), (t1, cpu1) = marks[2 * stages], marks[-2 * stages]
    counted = len(marks) - 4 * stages
    rate = counted / (t1 - t0)
    return PipelineSpeed(rate / alone, rate, 1000 * (cpu1 - cpu0) / counted / stages)


def _drive(group: RayStages, out: Path, steps: int, marks: list[tuple[float, float]] | None = None) -> None:
    class Clock(_Silence):
        def on_step(self, step: int, metrics: dict[str, float]) -> None:
            if marks is not None:
                marks.append((time.perf_counter(), time.process_time()))

    plan = TrainingSchedule(steps, constant(1, 64), lambda step: 0.0, 2 * len(group.places), steps + 1, 0)
    out.mkdir(exist_ok=True)
    store = CheckpointStore(out)
    nothing: dict[str, Any] = {}
    pretrain(
        plan,
        group,
        store,
        lambda step: Manifest(step, 1, nothing, nothing, ()),
        Clock(),
        RestartPolicy(0),
        StopRequest(),
    )
