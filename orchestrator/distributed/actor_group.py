"""The actors of a stage group in one placement group: created, found dead, replaced after the loss of a node, killed."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from bim.orchestrator.distributed.actor_failures import stage_failure
from bim.orchestrator.distributed.actors import ActorProcess
from bim.orchestrator.distributed.cluster import alive_nodes, raise_if_cluster_lost
from bim.orchestrator.distributed.placement import PlacementError, StageLayout
from bim.orchestrator.distributed.placement_group import (
    create_placement_group,
    has_lost_bundles,
    release_placement_group,
)
from bim.orchestrator.training.errors import Interrupted, StageFailure
from bim.orchestrator.training.stage_group import ShouldGiveUp, component_label
from bim.orchestrator.training.watchdog import LOADER

POLL_S = 1.0

ACTOR_START_TIMEOUT_S = 300  # importing torch and timm on a loaded machine takes tens of seconds

KILL_TIMEOUT_S = 20  # for a task that kills a process on another node

MAX_LOST_STARTS = 3
"""How often in one `ensure` an actor is created again because a node was lost that Ray still counted as alive."""

log = logging.getLogger(__name__)

MakeActor = Callable[[int], tuple[type, tuple[Any, ...]]]
"""A component, `LOADER` or a stage's number -> the class of its actor and the arguments of the constructor."""


class ActorGroup:
    """The data loader and the stages as actors; `LOADER`, 0, 1, ... name them.

    Args:
        wait_s: how long to wait for capacity (an autoscaling cluster grows in this time).
        placement_group: one that the caller removes, whose bundles from `first_bundle` on are `layout.bundles`; None:
            create one.
    """

    def __init__(
        self,
        layout: StageLayout,
        make_actor: MakeActor,
        wait_s: float,
        placement_group: PlacementGroup | None = None,
        first_bundle: int = 0,
    ) -> None:
        self._layout, self._make_actor, self._wait_s = layout, make_actor, wait_s
        self._placement_group, self._is_borrowed = placement_group, placement_group is not None
        self._first_bundle = first_bundle
        self.components = (LOADER, *range(len(layout.stage_blocks)))
        self._actors: dict[int, Any] = {}
        self.processes: dict[int, ActorProcess] = {}
        """Where the components live, or lived last."""

    @property
    def loader(self) -> Any:
        return self._actors.get(LOADER)

    @property
    def stages(self) -> list[Any]:
        """The actors of the stages, first stage first."""
        return [self._actors[component] for component in self.components[1:]]

    def ensure(self, should_give_up: ShouldGiveUp) -> bool:
        """Create the placement group if there is none and every actor that is not alive. Returns whether any was missing.

        Raises:
            PlacementError: no capacity within `wait_s`.
            StageFailure: the constructor of an actor raised, or it died.
            Interrupted: `should_give_up()`.
        """
        if self._placement_group is None:
            self._placement_group = create_placement_group(
                self._layout, self._wait_s, should_cancel=should_give_up
            )
            if self._placement_group is None:
                raise Interrupted
        self._forget_dead(should_give_up)
        missing = [component for component in self.components if component not in self._actors]
        for attempt in range(MAX_LOST_STARTS + 1):
            for component in self.components:
                if component not in self._actors:
                    self._actors[component] = self._create(component)
            try:
                self._await_start(should_give_up)
                break
            except StageFailure as failure:
                # Until Ray has noticed the loss of a node, new actors are sent there too: it is one failure.
                if not failure.process_lost or attempt == MAX_LOST_STARTS or not self._lost_nodes():
                    raise
                log.debug("%s\n%s", failure, failure.details)
                self._forget_dead(should_give_up)
        return bool(missing)

    def kill(self, component: int) -> None:
        """End the process of a component by force, also a stopped one; `ensure` creates it again."""
        actor, process = self._actors.pop(component, None), self.processes.get(component)
        if actor is not None:
            ray.kill(actor)
        if process is not None:
            self._kill_process(process)

    def release(self) -> None:
        """Kill the actors and remove the placement group, unless it is borrowed. Safe to call twice."""
        for actor in self._actors.values():
            ray.kill(actor)
        self._actors = {}
        if self._placement_group is not None and not self._is_borrowed:
            release_placement_group(self._placement_group)
            self._placement_group = None

    def _create(self, component: int) -> Any:
        assert self._placement_group is not None
        actor_class, arguments = self._make_actor(component)
        bundle, layout = max(0, component), self._layout
        cpus, gpus = (layout.loader_cpus, 0.0) if component == LOADER else (layout.cpus, layout.gpus)
        strategy = PlacementGroupSchedulingStrategy(
            self._placement_group, placement_group_bundle_index=self._first_bundle + bundle
        )
        options = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": 0, "max_task_retries": 0}
        remote = ray.remote(actor_class).options(**options, scheduling_strategy=strategy)
        return remote.remote(*arguments)

    def _forget_dead(self, should_give_up: ShouldGiveUp) -> None:
        """Drop the actors that do not answer."""
        pings = {actor.ping.remote(): component for component, actor in self._actors.items()}
        pending, start = list(pings), time.monotonic()
        while pending and time.monotonic() - start < ACTOR_START_TIMEOUT_S:
            ready, pending = ray.wait(pending, num_returns=len(pending), timeout=POLL_S, fetch_local=False)
            _check(should_give_up)
            for ping in ready:
                try:
                    ray.get(ping)
                except RayError:  # unreachable counts too: it may live on and hold a GPU
                    ray.kill(self._actors.pop(pings[ping]))
        for ping in pending:
            self.kill(pings[ping])

    def _await_start(self, should_give_up: ShouldGiveUp) -> None:
        """Wait until every actor answers, and note where it lives."""
        pings = {actor.ping.remote(): component for component, actor in self._actors.items()}
        pending, since = list(pings), time.monotonic()
        waits_for_node = False
        while pending:
            ready, pending = ray.wait(pending, num_returns=len(pending), timeout=POLL_S, fetch_local=False)
            _check(should_give_up)
            for ping in ready:
                self._note_process(pings[ping], ping)
            assert self._placement_group is not None
            lost = bool(pending) and has_lost_bundles(self._placement_group)
            if lost is not waits_for_node:
                waits_for_node, since = lost, time.monotonic()
                if lost:
                    log.warning("%s; waiting up to %.0f s for a node", self._describe_loss(), self._wait_s)
            waited = time.monotonic() - since
            if lost and waited > self._wait_s:
                raise PlacementError(
                    f"{self._describe_loss()}, and no node with {self._request} came within {self._wait_s:.0f} s; raise "
                    "placement.wait_s if replacing a lost node takes longer"
                )
            if pending and not lost and waited > max(ACTOR_START_TIMEOUT_S, self._wait_s):
                component = pings[pending[0]]
                self.kill(component)
                cause = TimeoutError(f"its process did not start within {waited:.0f} s")
                raise StageFailure(self._label(component), "while starting", cause, process_lost=True)

    def _note_process(self, component: int, ping: Any) -> None:
        try:
            self.processes[component] = ray.get(ping)
        except RayError as error:
            raise stage_failure(self._label(component), "while starting", error, None, None) from error

    def _lost_nodes(self) -> dict[str, list[int]]:
        """Node -> the components that lived on it, for every node that is gone."""
        alive = {node["NodeID"] for node in alive_nodes()}
        lost: dict[str, list[int]] = {}
        for component, process in sorted(self.processes.items()):
            if process.node_id not in alive:
                lost.setdefault(process.address, []).append(component)
        return lost

    def _describe_loss(self) -> str:
        lost = self._lost_nodes()
        if not lost:
            return f"Ray has no node with {self._request} for every stage any more"
        return "; ".join(
            f"node {address} is lost, with it {', '.join(map(self._label, components))}"
            for address, components in lost.items()
        )

    @property
    def _request(self) -> str:
        gpus = f", GPU: {self._layout.gpus:g}" if self._layout.gpus else ""
        return f"{{CPU: {self._layout.cpus:g}{gpus}}}"

    def _label(self, component: int) -> str:
        return component_label(component, self._layout.stage_blocks)

    def _kill_process(self, process: ActorProcess) -> None:
        """`ray.kill` asks a process to end; one that is stopped or hangs in a driver does not hear it."""
        if process.node_id == ray.get_runtime_context().get_node_id():
            kill_process(process.pid, process.start_time)
            return
        on_its_node = NodeAffinitySchedulingStrategy(process.node_id, soft=False)
        task = ray.remote(kill_process).options(num_cpus=0, max_retries=0, scheduling_strategy=on_its_node)
        with contextlib.suppress(RayError):  # the node is gone, or will be
            ray.get(task.remote(process.pid, process.start_time), timeout=KILL_TIMEOUT_S)


def kill_process(pid: int, start_time: float) -> None:
    """Send SIGKILL to the process of this node that started at `start_time`, if it is still there."""
    with contextlib.suppress(psutil.Error, ProcessLookupError):
        if abs(psutil.Process(pid).create_time() - start_time) < 1:
            os.kill(pid, signal.SIGKILL)


def _check(should_give_up: ShouldGiveUp) -> None:
    raise_if_cluster_lost()
    if should_give_up():
        raise Interrupted


def wait_all(references: Sequence[Any], timeout_s: float, should_give_up: ShouldGiveUp) -> list[Any]:
    """Wait until all calls have ended, well or not. Returns those that have not within `timeout_s`.

    Raises:
        ClusterLostError, Interrupted.
    """
    pending, start = list(references), time.monotonic()
    while pending:
        slice_s = min(POLL_S, timeout_s - (time.monotonic() - start))
        if slice_s <= 0:
            break
        _, pending = ray.wait(pending, num_returns=len(pending), timeout=slice_s, fetch_local=False)
        if pending:
            _check(should_give_up)
    return pending
