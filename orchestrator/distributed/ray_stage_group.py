"""The stage group as Ray actors: one placement group, one actor per stage, the data loader on the node of stage 0.

Activations and batches travel between actors as object references, which the driver holds and never reads. (Ray inlines
results below 100 KB in the task's reply.) Ray neither restarts actors nor retries tasks: a training step is not
idempotent, so the loop rewinds the whole stage group instead.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from bim.orchestrator.data.spec import DataSpec
from bim.orchestrator.distributed.actors import LoaderActor, StageActor
from bim.orchestrator.distributed.placement import PlacementError, StageLayout
from bim.orchestrator.distributed.placement_group import create_placement_group, release_placement_group
from bim.orchestrator.files import StorageError
from bim.orchestrator.training.errors import StageFailure, StorageUnsupportedError
from bim.orchestrator.training.manifest import FileRecord
from bim.orchestrator.training.messages import StageReport, StepReport, StepRequest
from bim.orchestrator.training.spec import PretrainSpec
from bim.orchestrator.training.stage_group import stage_label
from bim.orchestrator.training.storage import Location, is_url, remove_probe, write_probe

DRAIN_TIMEOUT_S = 600  # a stage that is still busy after this time counts as hung

ACTOR_START_TIMEOUT_S = 300  # importing torch and timm on a loaded machine takes tens of seconds


@dataclass(frozen=True)
class Pending:
    """References of one micro-batch in flight; the tasks that use the activations hold the references to those."""

    request: StepRequest
    load_info: Any
    reports: tuple[Any, ...]


class RayStages:
    """A stage group of Ray actors; implements `bim.orchestrator.training.stage_group.Stages`.

    Args:
        layout: the blocks and the resources of each stage.
        shared: where checkpoints are; must be visible on every node.
        wait_s: how long to wait for capacity (an autoscaling cluster grows in this time).
        group: a placement group that the caller removes, whose bundles from `first_bundle` on are `layout.bundles`; None:
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
        group: PlacementGroup | None = None,
        first_bundle: int = 0,
    ) -> None:
        self.stage_blocks = layout.stage_blocks
        self._spec, self._data, self._layout, self._shared = spec, data, layout, shared
        self._wait_s = wait_s
        self._placement_group, self._borrowed_placement_group = group, group is not None
        self._first_bundle = first_bundle
        self._actors: list[Any] = [None] * len(layout.stage_blocks)
        self._loader: Any = None
        self._pids: list[int] = []

    def pids(self) -> list[int]:
        """Process ids of the loader and of every stage, from the last `start`."""
        return list(self._pids)

    def start(self) -> None:
        """Create the placement group if there is none, and every actor that is not alive.

        Raises:
            PlacementError: no capacity within `wait_s`, or `shared` is not visible on every node.
            StageFailure: the constructor of an actor raised.
        """
        if self._placement_group is None:
            self._placement_group = create_placement_group(self._layout, self._wait_s)
        if self._ensure_actors():
            self._check_shared()

    def restore(self, checkpoint: Location | None, step: int) -> None:
        folder = None if checkpoint is None else str(checkpoint)
        context = "while starting" if checkpoint is None else f"while going back to step {step}"
        restored = [actor.restore.remote(folder, step) for actor in self._actors]
        self._get(context, self._loader.open.remote(), restored)

    def _ensure_actors(self) -> bool:
        """Create the missing actors and wait until all answer. Returns whether any was missing."""
        self._loader = self._loader if self._alive(self._loader) else None
        self._actors = [actor if self._alive(actor) else None for actor in self._actors]
        is_complete = self._loader is not None and None not in self._actors
        refs = self._create_missing_actors()
        # A borrowed placement group cannot be created again here; Ray reschedules its bundles on a replacement node.
        borrowed = self._borrowed_placement_group
        timeout = max(ACTOR_START_TIMEOUT_S, self._wait_s) if borrowed else ACTOR_START_TIMEOUT_S
        _, pending = ray.wait(refs, num_returns=len(refs), timeout=timeout, fetch_local=False)
        if pending and borrowed:
            raise PlacementError(
                f"{len(pending)} of {len(refs)} stage actors did not start: bundle not rescheduled within {timeout:.0f} s; "
                "raise placement.wait_s if replacing a lost node takes longer"
            )
        if pending:
            # A node is lost. Ray waits for a replacement without a limit; a new placement group has one.
            self._release()
            self._placement_group = create_placement_group(self._layout, self._wait_s)
            refs = self._create_missing_actors()
        self._pids = self._get("while starting", refs[0], refs[1:])
        return not is_complete

    def _create_missing_actors(self) -> list[Any]:
        """References to the process ids of the loader and of every stage."""
        layout = self._layout
        if self._loader is None:
            self._loader = self._remote(self.loader_class, 0, layout.loader_cpus, 0.0).remote(self._data)
        device = "cuda" if layout.gpus else "cpu"
        for i, blocks in enumerate(self.stage_blocks):
            if self._actors[i] is None:
                stage = self._remote(self.stage_class, i, layout.cpus, layout.gpus)
                self._actors[i] = stage.remote(self._spec, blocks, device, layout.threads)
        return [actor.ping.remote() for actor in (self._loader, *self._actors)]

    def submit(self, request: StepRequest) -> Pending:
        images, load_info = self._loader.batch.options(num_returns=2).remote(request.step, request.micro_step)
        payload: Any = None
        reports = []
        for actor in self._actors:
            payload, report = actor.train_step.options(num_returns=2).remote(request, images, payload)
            reports.append(report)
        return Pending(request, load_info, tuple(reports))

    def wait(self, pending: Pending) -> StepReport:
        context = f"at step {pending.request.step}"
        (bad, load_s), *reports = self._get(context, pending.load_info, pending.reports)
        stages: tuple[StageReport, ...] = tuple(reports)
        # Stages also wait for each other; only the time in which all of them are idle is a wait for data.
        data_wait_s = min(stage.idle_s - stage.mask_wait_s for stage in stages)
        return StepReport(pending.request, stages, bad, load_s, data_wait_s)

    def cancel_pending(self, pending: Sequence[Pending]) -> None:
        """Wait for every task in flight, also failed ones; kill all actors if one is busy after `DRAIN_TIMEOUT_S`."""
        refs = [ref for p in pending for ref in (p.load_info, *p.reports)]
        if not refs:
            return
        _, busy = ray.wait(refs, num_returns=len(refs), timeout=DRAIN_TIMEOUT_S, fetch_local=False)
        if busy:
            for actor in (self._loader, *self._actors):
                ray.kill(actor)
        for ref in refs:  # Ray logs every error that is never read
            with contextlib.suppress(Exception):
                ray.get(ref)

    def save(self, checkpoint: Location) -> tuple[FileRecord, ...]:
        saved = [actor.save.remote(str(checkpoint)) for actor in self._actors]
        records = self._get("while saving", None, saved)
        return tuple(record for stage in records for record in stage)

    def weights(self) -> dict[int, Any]:
        """Weights of every block, for comparisons in tests."""
        return {k: w for actor in self._actors for k, w in ray.get(actor.weights.remote()).items()}

    def close(self) -> None:
        """Kill the actors and remove the placement group, unless it is borrowed. Safe to call twice."""
        if self._loader is not None:
            with contextlib.suppress(RayError):  # `_release` kills the actor in any case
                ray.get(self._loader.close.remote(), timeout=10)
        self._release()

    def _release(self) -> None:
        for actor in (self._loader, *self._actors):
            if actor is not None:
                ray.kill(actor)
        self._loader, self._actors = None, [None] * len(self.stage_blocks)
        if self._placement_group is not None and not self._borrowed_placement_group:
            release_placement_group(self._placement_group)
            self._placement_group = None

    def _remote(self, cls: type, bundle: int, cpus: float, gpus: float) -> Any:
        assert self._placement_group is not None
        strategy = PlacementGroupSchedulingStrategy(
            self._placement_group, placement_group_bundle_index=self._first_bundle + bundle
        )
        return ray.remote(cls).options(
            num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0, scheduling_strategy=strategy
        )

    def _alive(self, actor: Any) -> bool:
        if actor is None:
            return False
        try:
            ray.get(actor.ping.remote(), timeout=ACTOR_START_TIMEOUT_S)
        except GetTimeoutError:
            ray.kill(actor)
            return False
        except RayActorError:
            return False
        return True

    def _get(self, context: str, loader_ref: Any, stage_refs: Sequence[Any]) -> list[Any]:
        """Results of the loader (unless its reference is None) and of every stage.

        Raises:
            StageFailure: the first failure in the order loader, stage 0, stage 1, ...
        """
        refs = ([] if loader_ref is None else [loader_ref]) + list(stage_refs)
        try:
            return ray.get(refs)
        except RayError:
            # No task may be running when the stage group is rewound.
            ray.wait(refs, num_returns=len(refs), timeout=DRAIN_TIMEOUT_S, fetch_local=False)
        names = ([] if loader_ref is None else ["the data loader"]) + [
            stage_label(i, b) for i, b in enumerate(self.stage_blocks)
        ]
        for name, ref in zip(names, refs, strict=True):
            try:
                ray.get(ref)
            except RayTaskError as error:
                process_lost = isinstance(error, RayActorError)
                cause = error.cause if isinstance(error.cause, Exception) else error
                raise StageFailure(name, context, cause, process_lost) from error
            except RayError as error:
                cause = RuntimeError(exit_reason(error))
                raise StageFailure(name, context, cause, process_lost=True) from error
        raise AssertionError("a reference failed and then did not")

    def _check_shared(self) -> None:
        probe = write_probe(self._shared)
        try:
            refs = [actor.path_exists.remote(str(probe)) for actor in self._actors]
            visible = self._get("while starting", None, refs)
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


def exit_reason(error: RayError) -> str:
    """Why a process ended, in one sentence: the first one of the last line of Ray's message, with the node."""
    text = str(error).strip()
    sentence = text.splitlines()[-1].split(". ")[0].rstrip(".") if text else type(error).__name__
    node = re.search(r"^\s*ip: (\S+)", text, re.MULTILINE)
    hints = [f"node {node[1]}"] if node else []
    hints += ["possibly out of memory"] if "OOM" in text else []
    return f"{sentence} ({', '.join(hints)})" if hints else sentence
