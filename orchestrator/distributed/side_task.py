"""A task beside a training on Ray: in resources that no stage holds, or on the node of the first stage while all wait."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from bim.orchestrator.distributed.cluster import raise_if_cluster_lost, result_of
from bim.orchestrator.distributed.placement import StageLayout

Result = TypeVar("Result")


class SideTask(Generic[Result]):
    """A call of a function in another process."""

    def __init__(self, reference: Any) -> None:
        self._reference = reference

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
        returned: Result = result_of(self._reference)
        return returned

    def cancel(self) -> None:
        """End it by force."""
        with suppress(RayError):
            ray.cancel(self._reference, force=True)


def start_in_free_resources(
    function: Callable[..., Result], layout: StageLayout, *args: object
) -> SideTask[Result] | None:
    """Call `function(*args)` on a CPU that nobody holds, with a GPU if the stages have some; None if there is none."""
    gpus = 1.0 if layout.gpus else 0.0
    free = ray.available_resources()
    if free.get("CPU", 0.0) < 1 or free.get("GPU", 0.0) < gpus:
        return None
    options = {"num_cpus": 1, "num_gpus": gpus, "max_retries": 0}
    return SideTask(ray.remote(function).options(**options).remote(*args))


def start_beside_first_stage(
    function: Callable[..., Result], placement_group: PlacementGroup, *args: object
) -> SideTask[Result]:
    """Call `function(*args)` on the node of the first stage, in resources that the stages hold: let them wait meanwhile."""
    bundle = PlacementGroupSchedulingStrategy(placement_group, placement_group_bundle_index=0)
    options = {"num_cpus": 0, "num_gpus": 0, "max_retries": 0}
    return SideTask(ray.remote(function).options(scheduling_strategy=bundle, **options).remote(*args))
