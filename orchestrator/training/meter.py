"""Running means of the stages' metrics, throughput and remaining time, since the last rewind."""

from __future__ import annotations

import time
from collections import defaultdict

from bim.orchestrator.training.callbacks import EpochReport
from bim.orchestrator.training.messages import StepReport
from bim.orchestrator.training.schedule import TrainingSchedule

LOGS_PER_EPOCH = 10  # points per epoch of the step curves


class RunningMeans:
    """Means by name of the values added since the last `pop`."""

    def __init__(self) -> None:
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._counts: defaultdict[str, int] = defaultdict(int)

    def add(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._sums[name] += value
            self._counts[name] += 1

    def pop(self) -> dict[str, float]:
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._sums.clear()
        self._counts.clear()
        return means


class Meter:
    """Turns the reports of micro-batches into step metrics and epoch reports."""

    def __init__(self, schedule: TrainingSchedule) -> None:
        self._schedule = schedule
        self._step_means, self._epoch_means = RunningMeans(), RunningMeans()
        self._images = self._epoch_images = 0
        self._start = self._epoch_start = time.perf_counter()
        self._pause_s, self._reports_left = 0.0, 0

    def add(self, report: StepReport) -> None:
        """Add one micro-batch; after the last one of a step also count the step's images."""
        pause_s = self._pause_in(report)
        values = {"data/wait_s": report.data_wait_s - pause_s, "data/load_s": report.load_s}
        for number, stage in enumerate(report.stages):
            idle_s = max(0.0, stage.idle_s - pause_s)
            values[f"stage{number}/busy_share"] = stage.busy_s / max(1e-9, stage.busy_s + idle_s)
            values[f"stage{number}/mask_wait_s"] = stage.mask_wait_s
            for block, metrics in stage.blocks.items():
                values |= {f"block{block}/{name}": value for name, value in metrics.items()}
        self._step_means.add(values)
        self._epoch_means.add({k: v for k, v in values.items() if k.endswith(("/loss", "wait_s"))})
        if report.request.is_last_micro_step:
            images = self._schedule.phase(report.request.step).images_per_step
            self._images += images
            self._epoch_images += images

    def images_per_s(self) -> float:
        """Throughput since the last rewind."""
        return self._images / max(1e-9, time.perf_counter() - self._start)

    def leave_out(self, seconds: float) -> None:
        """Do not count the last `seconds`, in which the loop submitted nothing."""
        self._start += seconds
        self._epoch_start += seconds
        self._pause_s, self._reports_left = seconds, self._schedule.window + 1

    def _pause_in(self, report: StepReport) -> float:
        """Seconds of the last pause that the report counts as waiting for data: most of it, of one report."""
        if not self._reports_left:
            return 0.0
        self._reports_left -= 1
        if report.data_wait_s < self._pause_s / 2:
            return 0.0
        self._reports_left = 0
        return min(self._pause_s, report.data_wait_s)

    def step_metrics(self, step: int) -> dict[str, float] | None:
        """Means since the last call, `LOGS_PER_EPOCH` times per epoch; None after other steps."""
        phase = self._schedule.phase(step)
        within = phase.epoch_of(step)[1] + 1
        if within % max(1, phase.steps_per_epoch // LOGS_PER_EPOCH):
            return None
        return self._step_means.pop()

    def epoch_report(self, step: int) -> EpochReport | None:
        """The report of the epoch that ends with `step`; None inside an epoch."""
        phase = self._schedule.phase(step)
        epoch, index = phase.epoch_of(step)
        if index + 1 < phase.steps_per_epoch:
            return None
        now = time.perf_counter()
        means, seconds = self._epoch_means.pop(), max(1e-9, now - self._epoch_start)
        micro_steps = max(1, self._epoch_images // phase.images_per_step) * phase.grad_accum_steps
        mask_wait_s = max((v for k, v in means.items() if k.endswith("/mask_wait_s")), default=0.0)
        report = EpochReport(
            epoch + 1,
            self._schedule.epochs,
            losses={int(k[5:-5]): v for k, v in means.items() if k.endswith("/loss")},
            images_per_s=self._epoch_images / seconds,
            data_wait=min(1.0, means.get("data/wait_s", 0.0) * micro_steps / seconds),
            eta_s=self._schedule.remaining_images(step + 1) / self.images_per_s(),
            mask_wait=min(1.0, mask_wait_s * micro_steps / seconds),
        )
        self._epoch_start, self._epoch_images = now, 0
        return report
