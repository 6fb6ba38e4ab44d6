"""The training loop: pushes steps into stages, settles what comes back, commits checkpoints, rewinds after failures.

Knows neither Ray nor MLflow nor pydantic: the stages are behind `orchestrator.stages.Stages`, reports go to a `Listener`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from bim.orchestrator.data.errors import TooManyCorruptImagesError
from bim.orchestrator.data.phases import Phase, phase_at, steps_until
from bim.orchestrator.training.callbacks import EpochReport, Listener, StopRequest
from bim.orchestrator.training.checkpoint import CheckpointStore, Manifest, all_files
from bim.orchestrator.training.errors import StageFailure, TrainingError
from bim.orchestrator.training.messages import Order, StepReport
from bim.orchestrator.training.restart_policy import RestartPolicy
from bim.orchestrator.training.stage_group import Stages

LOGS_PER_EPOCH = 10  # points per epoch of the step curves


@dataclass(frozen=True)
class RunPlan:
    """How long and how fast.

    Args:
        phases: sizes of images and batches, by epoch; the pipeline is drained where one ends.
        lr: learning rate of a step.
        window: micro-batches under way at once; twice the number of stages keeps every stage busy, and it is the
            back-pressure: stage 0 can never be further ahead of the last one.
        checkpoint_epochs: epochs, or a part of one, between checkpoint marks; the last step of a phase always has one.
        max_bad_images: distinct unreadable images after which the run stops.
    """

    epochs: int
    phases: tuple[Phase, ...]
    lr: Callable[[int], float]
    window: int
    checkpoint_epochs: float
    max_bad_images: int

    @property
    def total_steps(self) -> int:
        return steps_until(self.phases, self.epochs)

    def phase(self, step: int) -> Phase:
        """The phase of an optimizer step."""
        return phase_at(self.phases, step)

    def turns(self, step: int) -> bool:
        """Whether a new phase begins with this step, after others."""
        return step > 0 and self.phase(step).first_step == step

    def marks(self, step: int) -> bool:
        """Whether the state after optimizer step `step` is to be saved."""
        phase, done = self.phase(step), step + 1
        every = max(1, round(self.checkpoint_epochs * phase.steps_per_epoch))
        return (
            (done - phase.first_step) % every == 0
            or done == self.total_steps
            or (done < self.total_steps and self.turns(done))
        )


@dataclass(frozen=True)
class PretrainResult:
    """How the loop ended. `stopped` is the word of who stopped it early (None: it ran to its end)."""

    step: int
    restarts: int
    stopped: str | None
    bad_images: dict[str, str]
    images_per_s: float


@dataclass
class _Means:
    """Running means by name, emptied when read."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        means = {name: total / self.counts[name] for name, total in self.sums.items()}
        self.sums, self.counts = {}, {}
        return means


def pretrain(
    plan: RunPlan,
    stages: Stages,
    store: CheckpointStore,
    manifest: Callable[[int], Manifest],
    listener: Listener,
    policy: RestartPolicy,
    stop: StopRequest,
) -> PretrainResult:
    """Train from the newest whole checkpoint in `store` (from the beginning if there is none) to the end of the plan.

    Args:
        manifest: makes the manifest of the state after so many steps, without files.

    Raises:
        TrainingError: a loss that is not finite, too many unreadable images. The last checkpoint stays.
        Exception: what a stage's code raised, when the restarts are used up.
    """
    loop = _Loop(plan, stages, store, manifest, listener, stop)
    restarts = 0
    while True:
        try:
            if loop.step is None:
                loop.rewind()
            stopped = loop.run()
            break
        except StageFailure as failure:
            loop.abandon()
            if stop.reason is not None:
                listener.say(f"{failure}; the run ends at the last checkpoint")
                stopped = stop.reason
                break
            if not policy.restarts(failure, restarts):
                if failure.died:
                    raise TrainingError(
                        f"{failure}, and was brought back {restarts} times before (failures.max_restarts); "
                        "the last checkpoint stays"
                    ) from failure
                raise failure.cause from failure
            restarts += 1
            listener.say(f"{failure}; rewinding all stages (restart {restarts} of {policy.max_restarts})")
    return PretrainResult(loop.settled, restarts, stopped, loop.bad_images, loop.images_per_s())


class _Loop:
    """The state of one run of the loop between two failures, and what outlives them (counts, bad images)."""

    def __init__(
        self,
        plan: RunPlan,
        stages: Stages,
        store: CheckpointStore,
        manifest: Callable[[int], Manifest],
        listener: Listener,
        stop: StopRequest,
    ) -> None:
        self._plan, self._stages, self._store = plan, stages, store
        self._manifest, self._listener, self._stop = manifest, listener, stop
        self._under_way: deque[tuple[Order, Any]] = deque()
        self._logged, self._epoch = _Means(), _Means()
        self._committed = -1
        self._images, self._clock = 0, time.perf_counter()
        self._epoch_images, self._epoch_clock = 0, self._clock
        self.bad_images: dict[str, str] = {}
        self.step: int | None = None
        """The next step to submit; None while the stages stand nowhere."""
        self.settled = 0
        """Steps of which every stage is done."""

    def rewind(self) -> None:
        """Bring all stages to the newest whole checkpoint, making those that are gone."""
        self._stages.start()
        found = self._store.latest()
        start = 0 if found is None else found.step
        self._stages.restore(None if found is None else self._store.directory(start), start)
        if start == self._plan.total_steps:
            self._listener.say(f"all {start} steps were trained before")
        elif start:
            self._listener.say(f"continuing after step {start} of {self._plan.total_steps}")
        if found is not None:
            self.bad_images = found.facts.get("bad_images", {}) | self.bad_images
        self._listener.on_rewind(start)
        self._committed = start if found is not None else -1
        self.step = self.settled = start
        self._logged, self._epoch = _Means(), _Means()
        self._clock, self._images = time.perf_counter(), 0
        self._epoch_clock, self._epoch_images = self._clock, 0

    def run(self) -> str | None:
        """Push and settle until the plan is done or somebody wants to stop. Returns who."""
        assert self.step is not None
        while self.step < self._plan.total_steps and self._stop.reason is None:
            step, mark = self.step, self._plan.marks(self.step)
            if self._plan.turns(step):
                self._settle(0)  # what is under way has another size
            micros = self._plan.phase(step).grad_accum_steps
            for micro in range(micros):
                last = micro == micros - 1
                where = str(self._store.directory(step + 1)) if mark and last else None
                order = Order(step, self._plan.lr(step), micro, micros, where)
                self._under_way.append((order, self._stages.submit(order)))
                self._settle(self._plan.window)
            self.step += 1
        self._settle(0)
        if self._stop.reason is not None:
            if self._committed != self.step:
                files = self._stages.save(self._store.directory(self.step))
                self._commit(self.step, [files])
            self._listener.say(f"checkpoint saved after step {self.step} of {self._plan.total_steps}")
        return self._stop.reason if self.step < self._plan.total_steps else None

    def abandon(self) -> None:
        """Forget what is under way, once nothing of it runs any more."""
        self._stages.abandon([pending for _, pending in self._under_way])
        self._under_way.clear()
        self.step = None

    def images_per_s(self) -> float:
        """Throughput since the last rewind."""
        return self._images / max(1e-9, time.perf_counter() - self._clock)

    def _settle(self, leave: int) -> None:
        while len(self._under_way) > leave:
            order, pending = self._under_way[0]
            report = self._stages.settle(pending)
            self._under_way.popleft()
            self._note(report)
            if order.last_micro:
                self.settled = order.step + 1
                if order.checkpoint is not None:
                    self._commit(self.settled, [stage.files for stage in report.stages])
                self._tell(order)

    def _commit(self, step: int, files: list[tuple[Any, ...]]) -> None:
        manifest = self._manifest(step)
        facts = manifest.facts | {"bad_images": self.bad_images}
        self._store.commit(replace(manifest, facts=facts, files=all_files(files)))
        self._committed = step
        self._listener.on_checkpoint(step)

    def _note(self, report: StepReport) -> None:
        values = {"data/wait_s": report.data_wait_s, "data/load_s": report.load_s}
        for number, stage in enumerate(report.stages):
            values[f"stage{number}/busy_share"] = stage.busy_s / max(1e-9, stage.busy_s + stage.idle_s)
            values[f"stage{number}/plan_wait_s"] = stage.plan_wait_s
            for block, metrics in stage.blocks.items():
                values |= {f"block{block}/{name}": value for name, value in metrics.items()}
        self._logged.add(values)
        self._epoch.add({k: v for k, v in values.items() if k.endswith(("/loss", "wait_s"))})
        for name, reason in report.bad_images:
            if name not in self.bad_images:
                self.bad_images[name] = reason
                self._listener.say(f"skipped an unreadable image: {name} ({reason})")
        if len(self.bad_images) > self._plan.max_bad_images:
            raise TooManyCorruptImagesError(
                f"{len(self.bad_images)} images could not be read, the last being {next(reversed(self.bad_images))}, and "
                f"data.max_bad_fraction allows {self._plan.max_bad_images}; repair or remove them, or raise it"
            )

    def _tell(self, order: Order) -> None:
        plan, now = self._plan, time.perf_counter()
        phase = plan.phase(order.step)
        self._images += phase.images_per_step
        self._epoch_images += phase.images_per_step
        done = order.step + 1
        epoch, within = phase.epoch_of(order.step)
        within += 1
        if within % max(1, phase.steps_per_epoch // LOGS_PER_EPOCH) == 0:
            means = self._logged.take()
            bad = {"data/bad_images": float(len(self.bad_images))}
            self._listener.on_step(done, means | bad | {"lr": order.lr, "images_per_s": self.images_per_s()})
        if within == phase.steps_per_epoch:
            means, seconds = self._epoch.take(), max(1e-9, now - self._epoch_clock)
            steps = max(1, self._epoch_images // phase.images_per_step)
            losses = {int(k[5:-5]): v for k, v in means.items() if k.endswith("/loss")}
            plan_wait = max((v for k, v in means.items() if k.endswith("/plan_wait_s")), default=0.0)
            wait, plan_wait = (
                min(1.0, mean * phase.grad_accum_steps * steps / seconds)
                for mean in (means.get("data/wait_s", 0.0), plan_wait)
            )
            rate = self._epoch_images / seconds
            eta = self._images_left(done) / self.images_per_s()
            self._listener.on_epoch(EpochReport(epoch + 1, plan.epochs, losses, rate, wait, eta, plan_wait))
            self._epoch_clock, self._epoch_images = now, 0

    def _images_left(self, done: int) -> float:
        """Images still to be trained on after `done` steps, each counted by its pixels relative to those of the present."""
        plan = self._plan
        now = plan.phase(max(0, done - 1))
        left = 0.0
        for number, phase in enumerate(plan.phases):
            following = (
                plan.phases[number + 1].first_step if number + 1 < len(plan.phases) else plan.total_steps
            )
            steps = max(0, min(following, plan.total_steps) - max(done, phase.first_step))
            pixels = phase.size[0] * phase.size[1] / max(1, now.size[0] * now.size[1])
            left += steps * phase.images_per_step * (pixels if phase.size != now.size else 1.0)
        return left
