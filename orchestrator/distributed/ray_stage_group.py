"""The same stages as Ray actors: one placement group, one actor per stage, the data loader beside stage 0.

Activations and batches go from actor to actor as object references; the driver holds the references and never reads them.
(Ray itself carries results below its inlining limit of 100 KB with the task's reply.) Actors are never restarted and tasks
never retried by Ray: a training step is not idempotent, so the loop rewinds the whole group instead.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from bim.orchestrator.data.spec import DataSpec
from bim.orchestrator.distributed.actors import LoaderActor, StageActor
from bim.orchestrator.distributed.cluster import gcs_is_reachable
from bim.orchestrator.distributed.placement import PlacementError, StageLayout
from bim.orchestrator.distributed.placement_group import create_placement_group
from bim.orchestrator.training.checkpoint import FileRecord
from bim.orchestrator.training.errors import StageFailure
from bim.orchestrator.training.messages import StageReport, StepReport, StepRequest
from bim.orchestrator.training.spec import PretrainSpec
from bim.orchestrator.training.stage_group import stage_label

DRAIN_TIMEOUT_S = 600  # a stage that is still busy after this long is taken for hung

ACTOR_START_TIMEOUT_S = 300  # importing torch and timm on a loaded machine takes tens of seconds


@dataclass(frozen=True)
class Pending:
    """References of one micro-batch under way; the activations' own references live with the tasks that use them."""

    order: StepRequest
    note: Any
    reports: tuple[Any, ...]


class RayStages:
    """A group of stage actors; implements `bim.orchestrator.training.stage_group.Stages`.

    Args:
        layout: where blocks live and what each stage asks for.
        shared: a folder that every stage must see (checkpoints); checked on a cluster of several machines.
        wait_s: how long to wait for the cluster to have room (an autoscaling one grows meanwhile).
        group: a placement group whose bundles from `first_bundle` on are `layout.bundles`, and which is somebody else's to
            remove; None: one of its own.
    """

    stage_class: type = StageActor
    loader_class: type = LoaderActor

    def __init__(
        self,
        spec: PretrainSpec,
        data: DataSpec,
        layout: StageLayout,
        shared: Path,
        wait_s: float = 120.0,
        group: PlacementGroup | None = None,
        first_bundle: int = 0,
    ) -> None:
        self.places = layout.places
        self._spec, self._data, self._layout, self._shared = spec, data, layout, shared
        self._wait_s = wait_s
        self._group, self._given, self._first_bundle = group, group is not None, first_bundle
        self._actors: list[Any] = [None] * len(layout.places)
        self._loader: Any = None
        self._pids: list[int] = []

    def pids(self) -> list[int]:
        """Process ids of the loader and of every stage, as of the last `start`."""
        return list(self._pids)

    def start(self) -> None:
        """Create the placement group if there is none, and every actor that is not alive.

        Raises:
            PlacementError: no room within `wait_s`.
            StageFailure: an actor could not be built.
        """
        if self._group is None:
            self._group = create_placement_group(self._layout, self._wait_s)
        if self._ensure_actors():
            self._check_shared()

    def restore(self, checkpoint: Path | None, step: int) -> None:
        where = None if checkpoint is None else str(checkpoint)
        when = "while starting" if checkpoint is None else f"while going back to step {step}"
        self._collect(
            when, self._loader.open.remote(), [actor.restore.remote(where, step) for actor in self._actors]
        )

    def _ensure_actors(self) -> bool:
        """Make the actors that are not there and wait until all are up. Returns whether any was made."""
        self._loader = self._loader if self._alive(self._loader) else None
        self._actors = [actor if self._alive(actor) else None for actor in self._actors]
        whole = self._loader is not None and None not in self._actors
        self._create_missing_actors()
        refs = [actor.ping.remote() for actor in (self._loader, *self._actors)]
        # Room that was given is not ours to ask for anew: Ray finds another machine for it, if one comes in time.
        patience = max(ACTOR_START_TIMEOUT_S, self._wait_s) if self._given else ACTOR_START_TIMEOUT_S
        _, waiting = ray.wait(refs, num_returns=len(refs), timeout=patience, fetch_local=False)
        if waiting and self._given:
            raise PlacementError(
                f"{len(waiting)} of {len(refs)} actors of the stages did not start within {patience:.0f} s; a lost "
                "machine was perhaps not replaced, for which placement.wait_s gives more time"
            )
        if waiting:
            # A machine is gone, and Ray waits for another one without an end: ask for room anew, with one.
            self._drop()
            self._group = create_placement_group(self._layout, self._wait_s)
            self._create_missing_actors()
            refs = [actor.ping.remote() for actor in (self._loader, *self._actors)]
        self._pids = self._collect("while starting", refs[0], refs[1:])
        return not whole

    def _create_missing_actors(self) -> None:
        layout = self._layout
        if self._loader is None:
            self._loader = self._remote(self.loader_class, 0, layout.loader_cpus, 0.0).remote(self._data)
        device = "cuda" if layout.gpus else "cpu"
        for i, blocks in enumerate(self.places):
            if self._actors[i] is None:
                make = self._remote(self.stage_class, i, layout.cpus, layout.gpus)
                self._actors[i] = make.remote(self._spec, blocks, device, layout.threads)

    def submit(self, order: StepRequest) -> Pending:
        images, note = self._loader.batch.options(num_returns=2).remote(order.step, order.micro)
        payload: Any = None
        reports = []
        for actor in self._actors:
            payload, report = actor.train_step.options(num_returns=2).remote(order, images, payload)
            reports.append(report)
        return Pending(order, note, tuple(reports))

    def settle(self, pending: Pending) -> StepReport:
        when = f"at step {pending.order.step}"
        (bad, load_s), *reports = self._collect(when, pending.note, pending.reports)
        stages: tuple[StageReport, ...] = tuple(reports)
        # One stage may wait for another; that none of them works at all is for want of data.
        return StepReport(pending.order, stages, bad, load_s, min(s.idle_s - s.mask_wait_s for s in stages))

    def cancel_pending(self, pending: Sequence[Pending]) -> None:
        """Wait for every outstanding task, failed ones included; kill what is still busy after `DRAIN_TIMEOUT_S`."""
        refs = [ref for p in pending for ref in (p.note, *p.reports)]
        if not refs:
            return
        _, busy = ray.wait(refs, num_returns=len(refs), timeout=DRAIN_TIMEOUT_S, fetch_local=False)
        if busy:
            for actor in (self._loader, *self._actors):
                ray.kill(actor)
        for ref in refs:  # Ray reports every error that nobody has looked at
            with contextlib.suppress(Exception):
                ray.get(ref)

    def save(self, checkpoint: Path) -> tuple[FileRecord, ...]:
        records = self._collect(
            "while saving", None, [actor.save.remote(str(checkpoint)) for actor in self._actors]
        )
        return tuple(record for stage in records for record in stage)

    def weights(self) -> dict[int, Any]:
        """Weights of every block, for comparisons in tests."""
        return {k: w for actor in self._actors for k, w in ray.get(actor.weights.remote()).items()}

    def close(self) -> None:
        """Kill the actors and give the placement group back. Safe to call twice."""
        if self._loader is not None:
            with contextlib.suppress(RayError):  # it is killed below all the same
                ray.get(self._loader.close.remote(), timeout=10)
        self._drop()

    def _drop(self) -> None:
        for actor in (self._loader, *self._actors):
            if actor is not None:
                ray.kill(actor)
        self._loader, self._actors = None, [None] * len(self.places)
        if self._group is not None and not self._given:
            if gcs_is_reachable():  # after a SIGTERM to a whole process group, a Ray of ours may be gone
                remove_placement_group(self._group)
            self._group = None

    def _remote(self, cls: type, bundle: int, cpus: float, gpus: float) -> Any:
        assert self._group is not None
        where = PlacementGroupSchedulingStrategy(
            self._group, placement_group_bundle_index=self._first_bundle + bundle
        )
        return ray.remote(cls).options(
            num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0, scheduling_strategy=where
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

    def _collect(self, when: str, loader_ref: Any, stage_refs: Sequence[Any]) -> list[Any]:
        """Results of the loader (if asked) and of every stage; the first failure in pipe order is the one to tell."""
        refs = ([] if loader_ref is None else [loader_ref]) + list(stage_refs)
        try:
            return ray.get(refs)
        except RayError:
            # Nothing of it shall still be running when the group is rewound.
            ray.wait(refs, num_returns=len(refs), timeout=DRAIN_TIMEOUT_S, fetch_local=False)
        names = ([] if loader_ref is None else ["the data loader"]) + [
            stage_label(i, b) for i, b in enumerate(self.places)
        ]
        for name, ref in zip(names, refs, strict=True):
            try:
                ray.get(ref)
            except RayTaskError as error:
                died = isinstance(error, RayActorError)
                cause = error.cause if isinstance(error.cause, Exception) else error
                raise StageFailure(name, when, cause, died) from error
            except RayError as error:
                raise StageFailure(name, when, error, died=True) from error
        raise AssertionError("a reference failed and then did not")

    def _check_shared(self) -> None:
        probe = self._shared / f".seen-by-all-{time.time_ns()}"
        probe.write_bytes(b"")
        try:
            asked = [actor.sees.remote(str(probe)) for actor in self._actors]
            seen = self._collect("while starting", None, asked)
        finally:
            probe.unlink()
        if not all(seen):
            blind = ", ".join(stage_label(i, b) for i, b in enumerate(self.places) if not seen[i])
            raise PlacementError(
                f"the output directory {self._shared} is not seen by {blind} on another machine; "
                "put out on storage that all machines share, so that a checkpoint can be read back anywhere"
            )
