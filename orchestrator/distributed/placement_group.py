"""Placement groups: created when the cluster has room, and removed."""

from __future__ import annotations

import time
from collections.abc import Callable

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from bim.orchestrator.distributed.cluster import cluster_resources, gcs_is_reachable
from bim.orchestrator.distributed.placement import PlacementError, StageLayout


def release_placement_group(group: PlacementGroup) -> None:
    """Remove a placement group; whatever still lives in it ends. Safe to call twice."""
    if ray.is_initialized() and gcs_is_reachable():
        remove_placement_group(group)


POLL_INTERVAL_S = 1  # between two looks whether there is room; Ray takes whole seconds


def create_placement_group(
    layout: StageLayout,
    wait_s: float,
    others: Callable[[], bool] = lambda: False,
    enough: Callable[[], bool] = lambda: False,
) -> PlacementGroup | None:
    """A placement group of the layout's bundles, once the cluster has room for it; None if `enough()` before.

    Args:
        wait_s: how long to wait for room (an autoscaling cluster grows meanwhile).
        others: whether somebody holds room that will be given back; the time that this is so does not count.

    Raises:
        PlacementError: no room within `wait_s`.
    """
    group = placement_group(layout.bundles, strategy="PACK")
    since = time.monotonic()
    try:
        while not group.wait(POLL_INTERVAL_S):
            if enough():
                remove_placement_group(group)
                return None
            if others():
                since = time.monotonic()
            elif time.monotonic() - since > wait_s:
                have = cluster_resources()
                raise PlacementError(
                    f"no room for {len(layout.places)} stages of {layout.cpus:g} CPU and {layout.gpus:g} GPU "
                    f"within {wait_s:.0f} s: "
                    f"the cluster has {have.cpus:g} CPU and {have.gpus:g} GPU, perhaps in use by another job"
                )
    except BaseException:
        if gcs_is_reachable():
            remove_placement_group(group)
        raise
    return group
