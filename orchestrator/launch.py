"""Connecting to Ray, and running one function where the stages ran. Joins the cluster it is told of, else starts one here.

Not for training: the actors are in `ray_stages.py`.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import psutil
import ray
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestrator.placement import ClusterResources, Layout
from orchestrator.ray_stages import PlacementGroup, answers, cluster_resources, head_answers, result_of

Result = TypeVar("Result")

LOCAL_STORE_SHARE = 0.15  # of the free memory; the window of batches and activations lies there
LOCAL_STORE_MAX = 8 << 30
LOCAL_STORE_MIN = 256 << 20


class ClusterError(ValueError):
    """The Ray cluster that was named does not answer."""


@contextmanager
def ray_cluster(say: Callable[[str], None]) -> Iterator[ClusterResources]:
    """Connect to the cluster that `RAY_ADDRESS` names (`auto`: the one on this machine), else start one for this process.

    A connection that was there before is used and left open. Yields what the cluster has.

    Raises:
        ClusterError: `RAY_ADDRESS` names a cluster that does not answer.
    """
    if ray.is_initialized():
        yield cluster_resources()
        return
    # Errors of stages are told once, by the loop, in one line.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    # Ray's coming default; unset, it prints a warning.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        _connect(say)
        yield cluster_resources()
    finally:
        ray.shutdown()


def _connect(say: Callable[[str], None]) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if told := os.environ.get("RAY_ADDRESS"):
        # Ray itself tries for many minutes, noisily.
        named = told.removeprefix("ray://")
        there = not re.search(r":\d+$", named) or answers(named)
        try:
            if not there:
                raise ConnectionError
            ray.init(address=told, **quiet)
        except OSError:  # ConnectionError among them
            raise ClusterError(
                f"no Ray cluster can be joined at RAY_ADDRESS={told}; start it, or unset RAY_ADDRESS to use this machine"
            ) from None
    else:
        free = psutil.virtual_memory().available
        store = int(min(LOCAL_STORE_MAX, max(LOCAL_STORE_MIN, free * LOCAL_STORE_SHARE)))
        ray.init(address="local", include_dashboard=False, object_store_memory=store, **quiet)
    have = cluster_resources()
    nodes = sum(node["Alive"] for node in ray.nodes())
    machines = "this machine" if nodes == 1 else f"{nodes} machines"
    say(f"Ray on {machines}: {have.cpus:g} CPU, {have.gpus:g} GPU")


def run_beside_stages(function: Callable[..., Result], layout: Layout, *args: object) -> Result:
    """Run `function(*args)` on a GPU of the cluster if the stages had one, else in this process. Returns what it returns."""
    if layout.gpus == 0:
        return function(*args)
    options = {"num_cpus": layout.cpus, "num_gpus": min(1.0, layout.gpus), "max_retries": 0}
    found: Result = result_of(ray.remote(function).options(**options).remote(*args))
    return found


def run_in_room(
    function: Callable[..., Result],
    group: PlacementGroup,
    layout: Layout,
    enough: Callable[[], bool],
    *args: object,
) -> Result | None:
    """Run `function(*args)` in a process of its own, in the room of the first stage, whose actors are gone.

    Returns what it returns; None if `enough()` before. A process that dies is tried again, so the function must be
    repeatable.
    """
    where = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
    options = {"num_cpus": layout.cpus, "num_gpus": min(1.0, layout.gpus), "max_retries": 2}
    reference = ray.remote(function).options(scheduling_strategy=where, **options).remote(*args)
    while not ray.wait([reference], timeout=0.5, fetch_local=False)[0]:
        if enough():
            ray.cancel(reference, force=True)
            return None
    found: Result = result_of(reference)
    return found


def give_room_back(group: PlacementGroup) -> None:
    """Remove a placement group; whatever still lives in it ends. Safe to call twice."""
    if ray.is_initialized() and head_answers():
        remove_placement_group(group)
