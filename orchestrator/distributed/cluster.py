"""Connecting to Ray, and running one function where the stages ran. Joins the cluster it is told of, else starts one here.

Not for training: the actors are in `ray_stages.py`.
"""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import psutil
import ray
from ray.exceptions import RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from bim.orchestrator.distributed.placement import ClusterResources, StageLayout

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
        there = not re.search(r":\d+$", named) or is_reachable(named)
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


def run_on_worker(function: Callable[..., Result], layout: StageLayout, *args: object) -> Result:
    """Run `function(*args)` on a GPU of the cluster if the stages had one, else in this process. Returns what it returns."""
    if layout.gpus == 0:
        return function(*args)
    options = {"num_cpus": layout.cpus, "num_gpus": min(1.0, layout.gpus), "max_retries": 0}
    found: Result = result_of(ray.remote(function).options(**options).remote(*args))
    return found


def run_in_bundle(
    function: Callable[..., Result],
    group: PlacementGroup,
    layout: StageLayout,
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


CONNECT_TIMEOUT_S = 5.0


def result_of(reference: Any) -> Any:
    """What a remote call returned. Raises the error that it raised, whose own words do not begin with where."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, Exception):
            raise error.cause from error
        raise


def gcs_is_reachable() -> bool:
    """Whether the connected cluster's head is there; Ray's own calls wait a minute for it, then end this process."""
    return is_reachable(str(ray.get_runtime_context().gcs_address))


def is_reachable(address: str) -> bool:
    """Whether something listens at HOST:PORT, known within seconds."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def cluster_resources() -> ClusterResources:
    """CPUs, GPUs and machines of the connected cluster."""
    have = ray.cluster_resources()
    nodes = sum(bool(node["Alive"] and node["Resources"].get("CPU")) for node in ray.nodes())
    return ClusterResources(float(have.get("CPU", 0.0)), float(have.get("GPU", 0.0)), max(1, nodes))
