"""Seconds of a micro-batch, from a short probe, and what follows from them for an epoch and for a training.

A probe trains a few micro-batches on the images and with the blocks of the run, and leaves nothing. What it found is
remembered by this process, and by an output directory for the runs that take its settings.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bim.orchestrator.data.errors import DataError
from bim.orchestrator.data.loader import TrainBatches
from bim.orchestrator.data.source import Source
from bim.orchestrator.data.splits import Splits
from bim.orchestrator.distributed.placement import StageLayout
from bim.orchestrator.files import atomic_write
from bim.orchestrator.runs.prepare import ResolvedRun
from bim.orchestrator.runs.step_probe import Probe, StepTimes
from bim.orchestrator.training.device_errors import breaks_device_context
from bim.orchestrator.training.errors import StageFailure, TrainingError
from bim.orchestrator.training.messages import StepRequest
from bim.orchestrator.training.stage_group import InProcessStages

STEP_TIMES = "step_times.json"

PROBE_S = 5.0
"""Seconds that a micro-batch of the probe may take, and all of them together after the first."""

MIN_PROBED = 3
"""Micro-batches that are timed, unless a single one takes longer than `PROBE_S`."""

RAY_CPU_S = 0.004
"""CPU seconds of a stage on Ray for a micro-batch, its share of the driver included (docs/benchmarks.md)."""

SHARED_FACTOR, SHARED_CPU_S = 1.16, 0.018
"""The same where stages and loader are more processes than there are CPUs: they slow one another down, and each spends more
beside its work. Four stages on two cores, width 96, took 265 ms of CPU time for 16 images of 64 px and 710 ms for 64, which
a single process trains in 152 ms and 540 ms."""


_known: dict[str, StepTimes] = {}
"""What was probed so far, by the keys of the probes."""


def known_times(probe: Probe) -> StepTimes | None:
    """What an equal probe found, in this process or in the run whose times were read; None without one."""
    return _known.get(probe.key)


def remember_times(probe: Probe, times: StepTimes) -> None:
    """Keep what a probe found, so that it is not repeated."""
    _known[probe.key] = times


def save_times(out: Path, probe: Probe, times: StepTimes) -> None:
    """Write what a probe found beside the settings of the run. Raises StorageError."""
    atomic_write(out / STEP_TIMES, json.dumps({"probe": probe.key, **asdict(times)}, indent=1) + "\n")


def read_times(folder: Path) -> None:
    """Remember what the run in `folder` was probed with; a file that is missing or cannot be read tells nothing."""
    try:
        values: Mapping[str, Any] = json.loads((folder / STEP_TIMES).read_text(encoding="utf-8"))
        seconds = tuple(float(value) for value in values["stages"])
        times = StepTimes(seconds, float(values["loading"]), float(values["scale"]))
        _known[str(values["probe"])] = times
    except (OSError, ValueError, KeyError, TypeError):
        return


def probe_steps(probe: Probe, images: tuple[Source, Splits] | None = None) -> StepTimes:
    """Train some micro-batches and time them; the largest that takes less than `PROBE_S`.

    images: those of the run, if they are open already.

    Raises:
        DataError: the images cannot be read here.
        TrainingError: not even the smallest micro-batch fits the device, or the step fails for another reason.
    """
    images = images or probe.data.open()
    whole, threads = probe.data.phases[0].batch_size, torch.get_num_threads()
    device = "cuda" if probe.layout.gpus and torch.cuda.is_available() else "cpu"
    try:
        times, batch = None, min(2, whole)
        timed_batch = batch
        while True:
            try:
                times = _timed(probe, images, device, batch)
            except StageFailure as error:
                if times is None or not breaks_device_context(error):
                    raise probe_error(error) from error
                break  # a smaller one tells enough
            timed_batch = batch
            step_s = sum(times.stages) + times.loading
            larger = min(whole, max(2 * batch, int(batch * PROBE_S / (4 * max(step_s, 1e-6)))))
            if batch == whole or step_s * larger / batch > PROBE_S:
                break
            batch = larger
    finally:
        torch.set_num_threads(threads)
        if device == "cuda":
            torch.cuda.empty_cache()  # the stages of the run start on the same device
    scale = whole / timed_batch
    return StepTimes(tuple(scale * s for s in times.stages), scale * times.loading, scale)


def probe_error(failure: StageFailure) -> DataError | TrainingError:
    """What a failed step of a probe is to the user: images that cannot be read, or a training that would fail too."""
    cause = failure.cause
    return cause if isinstance(cause, DataError) else TrainingError(str(failure))


def _timed(probe: Probe, images: tuple[Source, Splits], device: str, batch: int) -> StepTimes:
    """Median seconds of micro-batches of `batch` images."""
    phase, stage_blocks = replace(probe.data.phases[0], batch_size=batch), probe.layout.stage_blocks

    def loader() -> TrainBatches:
        return replace(probe.data, phases=(phase,)).batches_of(*images)

    stages = InProcessStages(probe.spec, loader, stage_blocks, device, probe.layout.threads)
    reports = []
    try:
        stages.restore(None, 0, lambda: False)
        start = time.perf_counter()
        for step in range(1 + 4 * MIN_PROBED):
            report = stages.wait(stages.submit(StepRequest(step, lr=0.0)), PROBE_S)
            if device == "cuda":
                torch.cuda.synchronize()
            reports.append(report)
            elapsed = time.perf_counter() - start
            if elapsed > PROBE_S or (step >= MIN_PROBED and elapsed > PROBE_S / 5):
                break
    finally:
        stages.close()
    timed = reports[1:] or reports  # the first one allocates
    busy = tuple(
        statistics.median_high([r.stages[k].busy_s for r in timed]) for k in range(len(stage_blocks))
    )
    return StepTimes(busy, statistics.median_high([r.load_s for r in timed]))


def micro_batch_seconds(
    times: StepTimes, layout: StageLayout, backend: str, cpus: float, workers: int
) -> float:
    """Seconds between two micro-batches of a run whose stages work at the same time as far as there is room.

    Args:
        cpus: of the machine, or the share of it; stages and loader share them.
        workers: processes that load; 0: one, beside the stages.
    """
    stages, loading = sum(times.stages), times.loading
    if backend == "in_process":
        return stages + (loading / workers if workers else loading)
    slowest = max(*times.stages, loading / max(1, workers))
    if layout.gpus:
        return slowest + RAY_CPU_S
    processes = len(times.stages) + max(1, workers)
    work = layout.threads * stages + loading
    if processes > cpus:
        work = SHARED_FACTOR * work + SHARED_CPU_S * processes
    else:
        work += RAY_CPU_S * len(times.stages)
    return max(slowest + RAY_CPU_S, work / cpus)


def epoch_seconds(run: ResolvedRun, micro_batch_s: float) -> float:
    """Seconds of an epoch of the last phase."""
    phase = run.phases[-1]
    return micro_batch_s * phase.steps_per_epoch * phase.grad_accum_steps


def training_seconds(run: ResolvedRun, micro_batch_s: float) -> float:
    """Seconds of all epochs. Earlier phases, of smaller images, count by their numbers of pixels."""
    last, epochs, total = run.phases[-1], run.settings.schedule.epochs, 0.0
    ends = [*(phase.first_epoch for phase in run.phases[1:]), epochs]
    for phase, end in zip(run.phases, ends, strict=True):
        pixels = phase.size[0] * phase.size[1] * phase.batch_size
        relative = pixels / (last.size[0] * last.size[1] * last.batch_size)
        micro_batches = (end - phase.first_epoch) * phase.steps_per_epoch * phase.grad_accum_steps
        total += micro_batches * micro_batch_s * relative
    return total
