"""Calls beside a training on Ray: in resources that no stage holds, or on the node of the first stage while all wait."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from bim.orchestrator.distributed.actor_failures import exit_reason
from bim.orchestrator.distributed.actors import ProcessActor
from bim.orchestrator.distributed.cluster import gcs_is_reachable, raise_if_cluster_lost, task_result
from bim.orchestrator.distributed.placement import StageLayout
from bim.orchestrator.distributed.placement_group import (
    PlacementGroup,
    node_of_first_bundle,
    release_placement_group,
)
from bim.orchestrator.training.errors import TrainingError

RESERVED_WITHIN_S = 5.0
"""Seconds in which resources that are free are reserved; the training waits meanwhile."""

ANSWERS_WITHIN_S = 5.0
"""Seconds in which an idle process answers, else it is given up."""

Result = TypeVar("Result")


class SideTask(Generic[Result]):
    """A call of a function in another process.

    Args:
        end: ends the process by force.
        reserved: resources that are freed with the call.
    """

    def __init__(
        self, reference: Any, end: Callable[[], None], reserved: PlacementGroup | None = None
    ) -> None:
        self._reference, self._end, self._reserved = reference, end, reserved

    def is_done(self, timeout_s: float = 0.0) -> bool:
        """Whether it has ended within `timeout_s` seconds. Raises ClusterLostError."""
        raise_if_cluster_lost()
        return bool(ray.wait([self._reference], timeout=timeout_s, fetch_local=False)[0])

    def result(self) -> Result:
        """What the function returned, once it is done. After an error its process serves no other call.

        Raises:
            Exception: what the function raised.
            TrainingError: its process died.
        """
        try:
            returned: Result = task_result(self._reference)
        except RayTaskError:
            self._end()
            raise
        except RayError as error:
            self._end()
            raise TrainingError(f"its process died: {exit_reason(error)}") from error
        except Exception:
            self._end()
            raise
        finally:
            self._free()
        return returned

    def cancel(self) -> None:
        """End it by force, and its process."""
        self._end()
        self._free()

    def _free(self) -> None:
        if self._reserved is not None:
            release_placement_group(self._reserved)
            self._reserved = None


class SideProcess:
    """Calls functions in another process beside the stages, one at a time.

    Without GPUs the process starts with the first call and serves the later ones on the same node. It holds no resources of
    Ray while it waits, so others get the CPU on which it computes; its memory it keeps. With GPUs every call has a process
    of its own, as an idle one with a CUDA context would hold memory of the device beside the stages.
    """

    def __init__(self, layout: StageLayout, placement_group: PlacementGroup) -> None:
        """placement_group: of the stages."""
        self._gpus, self._placement_group = (1.0 if layout.gpus else 0.0), placement_group
        self._actor: Any = None
        self._node = ""

    def start_in_free_resources(
        self, function: Callable[..., Result], *args: object
    ) -> SideTask[Result] | None:
        """Call it on an unreserved CPU, with a GPU of the same node if the stages have some; None without.

        Raises:
            PlacementError: the node is lost.
        """
        free = ray.available_resources()
        if free.get("CPU", 0.0) < 1 or free.get("GPU", 0.0) < self._gpus:
            return None
        # Reserved first: what is free may be on different nodes, or be taken by another job, and a call would wait for ever.
        reserved = ray.util.placement_group([{"CPU": 1.0} | ({"GPU": self._gpus} if self._gpus else {})])
        try:
            if not reserved.wait(RESERVED_WITHIN_S):
                release_placement_group(reserved)
                return None
            if self._gpus:
                reference, end = _start_task(partial(function, *args), reserved, cpus=1, gpus=self._gpus)
            else:
                reference, end = self._call(partial(function, *args), node_of_first_bundle(reserved))
        except BaseException:
            release_placement_group(reserved)
            raise
        return SideTask(reference, end, reserved)

    def start_beside_first_stage(self, function: Callable[..., Result], *args: object) -> SideTask[Result]:
        """Call it on the node of the first stage, in resources that the stages hold: let them wait meanwhile.

        Raises:
            PlacementError: the node is lost.
        """
        if self._gpus:
            return SideTask(*_start_task(partial(function, *args), self._placement_group))
        return SideTask(*self._call(partial(function, *args), node_of_first_bundle(self._placement_group)))

    def close(self) -> None:
        """End the process by force, if there is one; the next call starts another."""
        actor, self._actor = self._actor, None
        if actor is not None and _is_connected():
            ray.kill(actor)

    def _call(self, function: Callable[[], Any], node: str) -> tuple[Any, Callable[[], None]]:
        """Call it in the process on this node. Returns the reference of its result, and what ends the process."""
        if self._actor is not None and not (node == self._node and self._answers()):
            self.close()
        if self._actor is None:
            on_node = NodeAffinitySchedulingStrategy(node, soft=False)
            options = {"num_cpus": 0, "num_gpus": 0, "max_restarts": 0, "max_task_retries": 0}
            self._actor = ray.remote(ProcessActor).options(**options, scheduling_strategy=on_node).remote()
            self._node = node
        return self._actor.call.remote(function), self.close

    def _answers(self) -> bool:
        """Whether the process is alive."""
        raise_if_cluster_lost()
        ping = self._actor.ping.remote()
        try:
            if ray.wait([ping], timeout=ANSWERS_WITHIN_S, fetch_local=False)[0]:
                ray.get(ping)
                return True
        except RayError:
            pass
        return False


def _start_task(
    function: Callable[[], Any], placement_group: PlacementGroup, cpus: float = 0, gpus: float = 0
) -> tuple[Any, Callable[[], None]]:
    """Call it in a process of its own, in the first bundle. Returns the reference of its result, and what ends it."""
    bundle = PlacementGroupSchedulingStrategy(placement_group, placement_group_bundle_index=0)
    options = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": 0}
    reference = ray.remote(_called).options(scheduling_strategy=bundle, **options).remote(function)

    def end() -> None:
        if _is_connected():
            with suppress(RayError):
                ray.cancel(reference, force=True)

    return reference, end


def _is_connected() -> bool:
    """Whether Ray can end a process. Its calls wait a minute for a head that is gone, with which processes end anyway."""
    return ray.is_initialized() and gcs_is_reachable()


def _called(function: Callable[[], Result]) -> Result:
    """Ray names a process by the function that it runs; a partial one has no name."""
    return function()
