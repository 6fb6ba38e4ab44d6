"""A task beside a training on Ray: in resources that no stage holds, or on the node of the first stage while all wait."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from bim.orchestrator.distributed.cluster import raise_if_cluster_lost, result_of
from bim.orchestrator.distributed.placement import StageLayout
from bim.orchestrator.distributed.placement_group import PlacementGroup, release_placement_group

RESERVED_WITHIN_S = 5.0
"""Seconds in which resources that are free are reserved; the training waits meanwhile."""

Result = TypeVar("Result")


class SideTask(Generic[Result]):
    """A call of a function in another process.

    Args:
        reserved: resources that are freed with it.
    """

    def __init__(self, reference: Any, reserved: PlacementGroup | None = None) -> None:
        self._reference, self._reserved = reference, reserved

    def is_done(self, timeout_s: float = 0.0) -> bool:
        """Whether it has ended within `timeout_s` seconds. Raises ClusterLostError."""
        raise_if_cluster_lost()
        return bool(ray.wait([self._reference], timeout=timeout_s, fetch_local=False)[0])

    def result(self) -> Result:
        """What the function returned, once it is done.

        Raises:
            Exception: what the function raised.
            TrainingError: its process died.
        """
        try:
            returned: Result = result_of(self._reference)
        finally:
            self._free()
        return returned

    def cancel(self) -> None:
        """End it by force."""
        with suppress(RayError):
            ray.cancel(self._reference, force=True)
        self._free()

    def _free(self) -> None:
        if self._reserved is not None:
            release_placement_group(self._reserved)
            self._reserved = None


def start_in_free_resources(
    function: Callable[..., Result], layout: StageLayout, *args: object
) -> SideTask[Result] | None:
    """Call `function(*args)` on an unreserved CPU, with a GPU of the same node if the stages have some; None without."""
    gpus = 1.0 if layout.gpus else 0.0
    free = ray.available_resources()
    if free.get("CPU", 0.0) < 1 or free.get("GPU", 0.0) < gpus:
        return None
    # Reserved first: what is free may be on different nodes, or be taken by another job, and a task would wait for ever.
    reserved = ray.util.placement_group([{"CPU": 1.0} | ({"GPU": gpus} if gpus else {})])
    if not reserved.wait(RESERVED_WITHIN_S):
        release_placement_group(reserved)
        return None
    return SideTask(_start(function, reserved, {"num_cpus": 1, "num_gpus": gpus}, args), reserved)


def start_beside_first_stage(
    function: Callable[..., Result], placement_group: PlacementGroup, *args: object
) -> SideTask[Result]:
    """Call `function(*args)` on the node of the first stage, in resources that the stages hold: let them wait meanwhile."""
    return SideTask(_start(function, placement_group, {"num_cpus": 0, "num_gpus": 0}, args))


def _start(
    function: Callable[..., Any],
    placement_group: PlacementGroup,
    resources: dict[str, float],
    args: tuple[object, ...],
) -> Any:
    bundle = PlacementGroupSchedulingStrategy(placement_group, placement_group_bundle_index=0)
    return ray.remote(function).options(scheduling_strategy=bundle, max_retries=0, **resources).remote(*args)
