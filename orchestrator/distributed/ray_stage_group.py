"""The stage group as Ray actors: one placement group, one actor per stage, the data loader on the node of stage 0.

Activations and batches travel between actors as object references, which the driver holds and never reads. (Ray inlines
results below 100 KB in the task's reply.) Ray neither restarts actors nor retries tasks: a training step is not
idempotent, so the loop rewinds the whole stage group instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup

from bim.orchestrator.data.spec import DataSpec
from bim.orchestrator.distributed.actor_failures import stage_failure
from bim.orchestrator.distributed.actor_group import ActorGroup, wait_all
from bim.orchestrator.distributed.cluster import raise_if_cluster_lost
from bim.orchestrator.distributed.loader_actor import LoaderActor
from bim.orchestrator.distributed.placement import PlacementError, StageLayout
from bim.orchestrator.distributed.stage_actor import StageActor
from bim.orchestrator.files import StorageError
from bim.orchestrator.training.device_errors import breaks_device_context
from bim.orchestrator.training.errors import (
    CheckpointDamagedError,
    Interrupted,
    StageFailure,
    StorageUnsupportedError,
)
from bim.orchestrator.training.messages import SavedBlocks, StageReport, StepReport, StepRequest
from bim.orchestrator.training.spec import PretrainSpec
from bim.orchestrator.training.stage_group import ShouldGiveUp, component_label, stage_label
from bim.orchestrator.training.storage import Location, is_url, remove_probe, write_probe
from bim.orchestrator.training.watchdog import LOADER

DRAIN_TIMEOUT_S = 600  # a component that is still busy this long after another one failed counts as hung

RESTORE_TIMEOUT_S = 1800  # building the blocks and reading a checkpoint, or writing one

FETCH_TIMEOUT_S = 60  # for a result that is there

CLOSE_TIMEOUT_S = 3  # for the loader to end its data workers

Result = TypeVar("Result")


@dataclass(frozen=True)
class Pending:
    """References of one micro-batch in flight; the tasks that use the activations hold the references to those."""

    request: StepRequest
    load_info: Any
    reports: tuple[Any, ...]

    @property
    def references(self) -> list[Any]:
        """Of the loader and of every stage."""
        return [self.load_info, *self.reports]


class RayStages:
    """A stage group of Ray actors; implements `bim.orchestrator.training.stage_group.Stages`.

    Args:
        layout: the blocks and the resources of each stage.
        shared: where checkpoints are; must be visible on every node.
        wait_s: how long to wait for capacity (an autoscaling cluster grows in this time).
        placement_group: one that the caller removes, whose bundles from `first_bundle` on are `layout.bundles`; None:
            create one.
    """

    stage_class: type = StageActor
    loader_class: type = LoaderActor

    def __init__(
        self,
        spec: PretrainSpec,
        data: DataSpec,
        layout: StageLayout,
        shared: Location,
        wait_s: float = 120.0,
        placement_group: PlacementGroup | None = None,
        first_bundle: int = 0,
    ) -> None:
        self.stage_blocks = layout.stage_blocks
        self._spec, self._data, self._layout, self._shared = spec, data, layout, shared
        self._actors = ActorGroup(layout, self._actor_class, wait_s, placement_group, first_bundle)
        self._stop_requested: ShouldGiveUp = lambda: False

    def pids(self) -> list[int]:
        """Process ids of the loader and of every stage, from the last `start`; empty before it."""
        processes = self._actors.processes
        return [processes[component].pid for component in self._actors.components if component in processes]

    def start(self, should_give_up: ShouldGiveUp) -> None:
        """Create the placement group if there is none, and every actor that is not alive.

        Raises:
            PlacementError: no capacity within `wait_s`, or `shared` is not visible on every node.
            StageFailure: the constructor of an actor raised.
            Interrupted: `should_give_up()`.
        """
        self._stop_requested = should_give_up
        if self._actors.ensure(should_give_up):
            self._check_shared()

    def _actor_class(self, component: int) -> tuple[type, tuple[Any, ...]]:
        if component == LOADER:
            return self.loader_class, (self._data,)
        device = "cuda" if self._layout.gpus else "cpu"
        return self.stage_class, (self._spec, self.stage_blocks[component], device, self._layout.threads)

    def restore(self, checkpoint: Location | None, step: int, should_give_up: ShouldGiveUp) -> None:
        """Also replaces, in the next `start`, every actor whose `restore` raises: what a process holds may be broken."""
        folder = None if checkpoint is None else str(checkpoint)
        context = "while starting" if checkpoint is None else f"while going back to step {step}"
        references = [self._actors.loader.open.remote()]
        references += [actor.restore.remote(folder, step) for actor in self._actors.stages]
        try:
            self._finish(context, references, should_give_up)
        except StageFailure as failure:
            if not isinstance(failure.cause, CheckpointDamagedError):
                self._actors.kill(self._component(failure))
            raise

    def submit(self, request: StepRequest) -> Pending:
        loader = self._actors.loader
        images, load_info = loader.batch.options(num_returns=2).remote(request.step, request.micro_step)
        payload: Any = None
        reports = []
        for actor in self._actors.stages:
            payload, report = actor.train_step.options(num_returns=2).remote(request, images, payload)
            reports.append(report)
        return Pending(request, load_info, tuple(reports))

    def wait(self, pending: Pending, timeout_s: float) -> StepReport | None:
        raise_if_cluster_lost()
        references = pending.references
        try:
            results = ray.get(references, timeout=timeout_s)
        except RayError as error:
            if isinstance(error, GetTimeoutError) and not isinstance(error, RayTaskError):
                return None
            step = pending.request.step
            results = self._drain(f"at step {step}", references, step)
        (bad, load_s), *reports = results
        stages: tuple[StageReport, ...] = tuple(reports)
        # Stages also wait for each other; only the time in which all of them are idle is a wait for data.
        data_wait_s = min(stage.idle_s - stage.mask_wait_s for stage in stages)
        return StepReport(pending.request, stages, bad, load_s, data_wait_s)

    def awaited(self, pending: Pending) -> int:
        references = pending.references
        ready, _ = ray.wait(references, num_returns=len(references), timeout=0, fetch_local=False)
        unfinished = (
            c for c, ref in zip(self._actors.components, references, strict=True) if ref not in ready
        )
        return next(unfinished, self._actors.components[-1])

    def kill(self, component: int) -> None:
        self._actors.kill(component)

    def cancel_pending(self, pending: Sequence[Pending], should_give_up: ShouldGiveUp) -> None:
        """Wait for every task in flight, also failed ones; kill the actors that are busy after `DRAIN_TIMEOUT_S`."""
        by_component = [
            (component, ref)
            for each in pending
            for component, ref in zip(self._actors.components, each.references, strict=True)
        ]
        references = [ref for _, ref in by_component]
        try:
            busy = wait_all(references, DRAIN_TIMEOUT_S, should_give_up)
        except Interrupted:
            return
        # A stage without input is not busy itself: the first busy one hangs, the later ones wait for it.
        for component in {component for component, ref in by_component if ref in busy}:
            self._actors.kill(component)
        for ref in references:  # Ray logs every error that is never read
            with contextlib.suppress(Exception):
                ray.get(ref, timeout=FETCH_TIMEOUT_S)

    def save(self, checkpoint: Location, should_give_up: ShouldGiveUp) -> None:
        calls = [actor.save.remote(str(checkpoint)) for actor in self._actors.stages]
        self._finish("while saving", calls, should_give_up)

    def flush(self, should_give_up: ShouldGiveUp) -> tuple[tuple[SavedBlocks, ...], ...]:
        calls = [actor.flush.remote() for actor in self._actors.stages]
        return tuple(self._finish("while saving", calls, should_give_up))

    def call(self, function: Callable[[], Result]) -> list[Result]:
        """`function()` in the process of every stage, first stage first. Raises StageFailure."""
        calls = [actor.call.remote(function) for actor in self._actors.stages]
        return self._finish("while starting", calls, self._stop_requested)

    def weights(self) -> dict[int, Any]:
        """Weights of every block, for comparisons in tests."""
        return {k: w for actor in self._actors.stages for k, w in ray.get(actor.weights.remote()).items()}

    def close(self) -> None:
        """Kill the actors and remove the placement group, unless it is borrowed. Safe to call twice."""
        if self._actors.loader is not None:
            with contextlib.suppress(RayError):  # `release` kills the actor in any case
                ray.get(self._actors.loader.close.remote(), timeout=CLOSE_TIMEOUT_S)
        self._actors.release()

    def _finish(self, context: str, references: list[Any], should_give_up: ShouldGiveUp) -> list[Any]:
        """Results of one call of every component, or of every stage.

        Raises:
            StageFailure: of the first component that failed.
            Interrupted: `should_give_up()`.
        """
        if wait_all(references, RESTORE_TIMEOUT_S, should_give_up):
            return self._drain(context, references, None, drain_s=0)
        with contextlib.suppress(RayError):
            return ray.get(references)
        return self._drain(context, references, None)

    def _drain(
        self, context: str, references: list[Any], step: int | None, drain_s: float | None = None
    ) -> list[Any]:
        """Results after one could not be had: all of them if that was for the moment only.

        No task may be running when the stage group is rewound, so all are waited for, and those that hang killed.

        Raises:
            StageFailure: the first failure in the order loader, stage 0, stage 1, ...
        """
        with contextlib.suppress(Interrupted):  # nothing can be saved any more
            wait_all(references, DRAIN_TIMEOUT_S if drain_s is None else drain_s, self._stop_requested)
        components = self._actors.components[-len(references) :]
        results: list[Any] = []
        failures: list[tuple[int, StageFailure]] = []
        for component, ref in zip(components, references, strict=True):
            try:
                results.append(ray.get(ref, timeout=FETCH_TIMEOUT_S if not failures else 1))
            except RayError as error:
                failures.append((component, self._failure(component, context, error, step)))
        if not failures:
            return results
        for component, failure in failures:
            if isinstance(failure.cause, TimeoutError):
                self._actors.kill(component)
        component, failure = failures[0]  # the calls of later stages fail with the same error
        if breaks_device_context(failure.cause):
            self._actors.kill(component)
        raise failure

    def _failure(self, component: int, context: str, error: RayError, step: int | None) -> StageFailure:
        label = component_label(component, self.stage_blocks)
        if isinstance(error, GetTimeoutError) and not isinstance(error, RayTaskError):
            cause = TimeoutError("no answer")
            return StageFailure(label, context, cause, process_lost=True, step=step)
        failure = stage_failure(label, context, error, step, self._actors.processes.get(component))
        failure.__cause__ = error
        return failure

    def _component(self, failure: StageFailure) -> int:
        labels = {component_label(c, self.stage_blocks): c for c in self._actors.components}
        return labels[failure.component]

    def _check_shared(self) -> None:
        probe = write_probe(self._shared)
        try:
            calls = [actor.path_exists.remote(str(probe)) for actor in self._actors.stages]
            visible = self._finish("while starting", calls, self._stop_requested)
        except StageFailure as failure:
            if isinstance(failure.cause, StorageError | StorageUnsupportedError):
                raise PlacementError(
                    f"checkpoint.storage on the node of {failure.component}: {failure.cause}"
                ) from failure
            raise
        finally:
            remove_probe(probe)
        if not all(visible):
            stages = ", ".join(stage_label(i, b) for i, b in enumerate(self.stage_blocks) if not visible[i])
            raise PlacementError(
                f"checkpoint.storage {self._shared} has other content on the node of {stages}; give it a URL that means "
                "the same on all nodes"
                if is_url(self._shared)
                else f"--out {self._shared} is not visible on the node of {stages}; put it on storage that all nodes "
                "share, or the checkpoints alone below a URL (checkpoint.storage)"
            )
