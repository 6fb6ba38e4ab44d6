"""Overhead of the pipeline: the training loop and the Ray stage group with stages that sleep instead of computing.

Sleeping stages also overlap on a machine with fewer cores than stages. Serves `pipelines/benchmark.py pipeline`.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bim.orchestrator.data.phases import constant
from bim.orchestrator.distributed.loader_actor import LoaderActor
from bim.orchestrator.distributed.placement import StageLayout, consecutive
from bim.orchestrator.distributed.ray_stage_group import RayStages
from bim.orchestrator.distributed.stage_actor import StageActor
from bim.orchestrator.training.callbacks import NullCallback, StopRequest
from bim.orchestrator.training.checkpoint import CheckpointStore
from bim.orchestrator.training.loop import pretrain
from bim.orchestrator.training.manifest import Manifest
from bim.orchestrator.training.messages import SavedBlocks, StageReport, StepRequest
from bim.orchestrator.training.restart_policy import RestartPolicy
from bim.orchestrator.training.schedule import TrainingSchedule
from bim.orchestrator.training.transport import Payload, ReceiveBuffer


@dataclass(frozen=True)
class SleepSpec:
    """Stages that sleep for `work_s` seconds and send `payload_bytes` to the next stage."""

    stages: int
    work_s: float
    payload_bytes: int


class SleepStage(StageActor):
    """Receives and copies payloads like a stage, and sleeps instead of training."""

    def __init__(self, spec: SleepSpec, blocks: tuple[int, ...], device: str, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._sleep = spec
        self._last = blocks[-1] == spec.stages - 1
        self._received = ReceiveBuffer(torch.device(device))
        self._saved: tuple[SavedBlocks, ...] = ()
        self._out = np.zeros(spec.payload_bytes // 4, dtype=np.float32)

    def restore(self, checkpoint: str | None, step: int) -> int:
        return step

    def train_step(
        self, request: StepRequest, images: Payload, incoming: Payload | None
    ) -> tuple[Payload | None, StageReport]:
        started = time.perf_counter()
        self._received.unpack("images", images)
        if incoming is not None:
            self._received.unpack("tokens", incoming)
        time.sleep(self._sleep.work_s)
        if request.checkpoint is not None:
            self._saved = (SavedBlocks(request.checkpoint, ()),)
        report = StageReport({0: {"loss": 0.0}}, (), time.perf_counter() - started, 0.0)
        return None if self._last else Payload("float32", self._out), report

    def save(self, checkpoint: str) -> None: ...

    def flush(self) -> tuple[SavedBlocks, ...]:
        saved, self._saved = self._saved, ()
        return saved


class SleepLoader(LoaderActor):
    """Returns the same small batch at once."""

    def __init__(self, data: object) -> None:
        self._images = np.zeros((64, 3, 32, 32), dtype=np.uint8)

    def batch(self, step: int, micro_step: int) -> tuple[Payload, tuple[tuple[tuple[str, str], ...], float]]:
        return Payload("uint8", self._images), ((), 0.0)

    def open(self) -> int:
        return 1

    def close(self) -> None: ...


class SleepStages(RayStages):
    """The Ray stage group with sleeping stages."""

    stage_class = SleepStage
    loader_class = SleepLoader


@dataclass(frozen=True)
class PipelineSpeed:
    """One measurement.

    efficiency: steps/s of the pipeline as a fraction of those of a single stage, without filling and draining.
    driver_ms: CPU time of the driver per step and stage, milliseconds.
    """

    efficiency: float
    steps_per_s: float
    driver_ms: float


def alone_steps_per_s(work_s: float, steps: int) -> float:
    """Steps/s of a single stage: the same sleep in a bare loop."""
    started = time.perf_counter()
    for _ in range(steps):
        time.sleep(work_s)
    return steps / (time.perf_counter() - started)


def pipeline_speed(stages: int, work_s: float, payload_bytes: int, steps: int, cpus: float) -> PipelineSpeed:
    """Run `steps` steps through `stages` sleeping stages with the training loop. Ray must be initialized."""
    alone = alone_steps_per_s(work_s, 100)
    cpus_each = cpus / (stages + 1)
    layout = StageLayout(consecutive(stages, stages), 0.0, cpus_each, cpus_each, threads=1)
    with tempfile.TemporaryDirectory() as out:
        group = SleepStages(SleepSpec(stages, work_s, payload_bytes), None, layout, Path(out))  # type: ignore[arg-type]
        try:
            _drive(group, Path(out), 50)  # warm up connections, buffers and the pages of the object store
            marks: list[tuple[float, float]] = []
            _drive(group, Path(out) / "timed", steps, marks)
        finally:
            group.close()
    # The first and last steps fill and drain the pipeline; the steps between them are the steady state.
    (t0, cpu0), (t1, cpu1) = marks[2 * stages], marks[-2 * stages]
    counted = len(marks) - 4 * stages
    rate = counted / (t1 - t0)
    return PipelineSpeed(rate / alone, rate, 1000 * (cpu1 - cpu0) / counted / stages)


def _drive(group: RayStages, out: Path, steps: int, marks: list[tuple[float, float]] | None = None) -> None:
    class Clock(NullCallback):
        def on_step(self, step: int, metrics: dict[str, float]) -> None:
            if marks is not None:
                marks.append((time.perf_counter(), time.process_time()))

    schedule = TrainingSchedule(
        steps, constant(1, 64), lambda step: 0.0, 2 * len(group.stage_blocks), steps + 1, 0
    )
    out.mkdir(exist_ok=True)
    store = CheckpointStore(out)
    pretrain(
        schedule,
        group,
        store,
        lambda step: Manifest(step, 1, {}, {}, ()),
        Clock(),
        RestartPolicy(0),
        StopRequest(),
    )
