"""Placement groups: created once the cluster has capacity, and removed."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from bim.orchestrator.distributed.cluster import (
    cluster_resources,
    gcs_is_reachable,
    raise_if_cluster_lost,
)
from bim.orchestrator.distributed.placement import PlacementError, StageLayout

POLL_INTERVAL_S = 1  # Ray takes whole seconds

log = logging.getLogger(__name__)


def release_placement_group(group: PlacementGroup) -> None:
    """Remove a placement group and end the actors in it. Safe to call twice."""
    # After a SIGTERM to the process group, the local Ray may be gone already.
    if ray.is_initialized() and gcs_is_reachable():
        remove_placement_group(group)


def create_placement_group(
    layout: StageLayout,
    timeout_s: float,
    is_blocked_by_peers: Callable[[], bool] = lambda: False,
    should_cancel: Callable[[], bool] = lambda: False,
) -> PlacementGroup | None:
    """A placement group of the layout's bundles, once it is scheduled; None once `should_cancel()`.

    Args:
        timeout_s: how long to wait for capacity (an autoscaling cluster grows in this time).
        is_blocked_by_peers: whether resources are held that will be released; this time does not count.

    Raises:
        PlacementError: not scheduled within `timeout_s`.
    """
    group = placement_group(layout.bundles, strategy="PACK")
    since = time.monotonic()
    try:
        while not group.wait(POLL_INTERVAL_S):
            raise_if_cluster_lost()
            if should_cancel():
                release_placement_group(group)
                return None
            if is_blocked_by_peers():
                since = time.monotonic()
            elif time.monotonic() - since > timeout_s:
                total, free = cluster_resources(), ray.available_resources()
                raise PlacementError(
                    f"placement group of {len(layout.stage_blocks)} x {{CPU: {layout.cpus:g}, GPU: {layout.gpus:g}}} not "
                    f"schedulable within {timeout_s:.0f} s; cluster total {total.cpus:g} CPU, {total.gpus:g} GPU, "
                    f"available {free.get('CPU', 0):g} CPU, {free.get('GPU', 0):g} GPU"
                )
    except BaseException:
        release_placement_group(group)
        raise
    return group


class LostNodeWatch:
    """While a task in a placement group is waited for: says that a node of the group is lost, and how long is waited.

    Ray keeps such a task pending, without a message, until there is another node.
    """

    def __init__(self, group: PlacementGroup, wait_s: float, action: str) -> None:
        """action: what the task does, as in "measuring"."""
        self._group, self._wait_s, self._action = group, wait_s, action
        self._looked = self._lost_since = -math.inf

    def check(self) -> None:
        """Look, at most once a second.

        Raises:
            PlacementError: the node is lost for longer than `wait_s`.
        """
        now = time.monotonic()
        if now - self._looked < POLL_INTERVAL_S:
            return
        self._looked = now
        if not has_lost_bundles(self._group):
            self._lost_since = -math.inf
        elif self._wait_s and self._lost_since == -math.inf:
            self._lost_since = now
            log.warning(
                "a node of the run is lost while %s; waiting up to %.0f s for another",
                self._action,
                self._wait_s,
            )
        elif now - self._lost_since > self._wait_s:
            if not self._wait_s:
                raise PlacementError(f"a node of the run is lost while {self._action}")
            raise PlacementError(
                f"a node of the run is lost while {self._action}, and no other came within {self._wait_s:.0f} s; raise "
                "placement.wait_s if replacing a lost node takes longer"
            )


def has_lost_bundles(group: PlacementGroup) -> bool:
    """Whether bundles of a placement group that was scheduled wait for a node again."""
    return str(placement_group_table(group).get("state")) in ("PENDING", "PREPARED", "RESCHEDULING")


def node_of_first_bundle(group: PlacementGroup) -> str:
    """Ray's id of the node that has the first bundle of a placement group that was scheduled.

    Raises:
        PlacementError: the node is lost.
    """
    node = placement_group_table(group).get("bundles_to_node_id", {}).get(0)
    if not node or has_lost_bundles(group):
        raise PlacementError("a node of the run is lost")
    return str(node)
