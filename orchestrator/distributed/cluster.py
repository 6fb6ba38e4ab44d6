"""Connection to a Ray cluster, and remote calls of single functions on the resources of the stages."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from bim.orchestrator.distributed.actor_failures import exit_reason
from bim.orchestrator.distributed.cluster_watch import ClusterWatch, is_reachable
from bim.orchestrator.distributed.local_ray import ClusterError, local_ray
from bim.orchestrator.distributed.placement import ClusterResources, PlacementError, StageLayout
from bim.orchestrator.signal_masks import kept_signal_handlers
from bim.orchestrator.training.errors import ClusterLostError, TrainingError

log = logging.getLogger(__name__)

Result = TypeVar("Result")

_watch: ClusterWatch | None = None


@contextmanager
def ray_cluster() -> Iterator[ClusterResources]:
    """Connect to the cluster that `RAY_ADDRESS` names (`auto`: the one on this machine), else start one for this process.

    An existing connection is used and stays open. Yields the resources of the cluster. Signal handlers stay as they are.

    Raises:
        ClusterError: the cluster that `RAY_ADDRESS` names cannot be reached, or none can be started on this machine.
    """
    if ray.is_initialized():
        yield cluster_resources()
        return
    # The training loop reports errors of stages.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    # Ray warns if this future default is unset.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = os.environ.get("RAY_ADDRESS")
    with _connected(address) if address else local_ray():
        resources = cluster_resources()
        nodes = len(alive_nodes())
        machines = "this machine" if nodes == 1 else f"{nodes} machines"
        log.info("Ray on %s: %g CPU, %g GPU", machines, resources.cpus, resources.gpus)
        with _watched():
            yield resources


@contextmanager
def _connected(address: str) -> Iterator[None]:
    try:
        host = address.removeprefix("ray://")
        try:
            # Without this check ray.init retries for many minutes.
            if re.search(r":\d+$", host) and not is_reachable(host):
                raise ConnectionError
            with kept_signal_handlers():
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except OSError:  # the base class of ConnectionError
            raise ClusterError(
                f"no Ray cluster can be joined at RAY_ADDRESS={address}; start it, or unset RAY_ADDRESS to use this "
                "machine"
            ) from None
        yield
    finally:
        ray.shutdown()


@contextmanager
def _watched() -> Iterator[None]:
    """Inside, `raise_if_cluster_lost` knows when the head or this node's part of Ray ended; not behind a Ray client."""
    global _watch
    if os.environ.get("RAY_ADDRESS", "").startswith("ray://"):
        yield  # a proxy on the head is the driver
        return
    context = ray.get_runtime_context()
    addresses = {"the head of the Ray cluster": str(context.gcs_address)}
    for node in ray.nodes():
        if node["NodeID"] == context.get_node_id():
            addresses["Ray on this machine"] = f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
    _watch = ClusterWatch({name: address for name, address in addresses.items() if is_reachable(address)})
    _watch.start()
    try:
        yield
    finally:
        _watch.stop()
        _watch = None


def raise_if_cluster_lost() -> None:
    """Raise ClusterLostError if the head of the cluster, or Ray on this machine, is gone. Costs nothing otherwise."""
    if _watch is not None and _watch.lost is not None:
        raise ClusterLostError(_watch.sentence)


def run_on_worker(
    function: Callable[..., Result], layout: StageLayout, *args: object, within_s: float | None = None
) -> Result:
    """Run `function(*args)` where the stages ran: on a GPU if they had one, on any node with CPUs for stages if there are
    several nodes, else in this process. Returns its result.

    within_s: seconds that it may take with the wait for a free node; None: any.

    Raises:
        PlacementError: it took longer.
    """
    if layout.gpus == 0 and len(alive_nodes()) <= 1:
        return function(*args)
    # The head of a cluster that gives Ray no CPUs gets no tasks.
    options = {"num_cpus": max(0.01, layout.cpus), "num_gpus": min(1.0, layout.gpus), "max_retries": 0}
    reference = ray.remote(function).options(**options).remote(*args)
    if within_s is not None and not ray.wait([reference], timeout=within_s, fetch_local=False)[0]:
        ray.cancel(reference, force=True)
        raise PlacementError(
            f"no GPU of the cluster became free within {within_s:.0f} s; end other jobs, or raise placement.wait_s"
        )
    result: Result = result_of(reference)
    return result


def run_in_bundle(
    function: Callable[..., Result],
    placement_group: PlacementGroup,
    layout: StageLayout,
    should_cancel: Callable[[], bool],
    *args: object,
) -> Result | None:
    """Run `function(*args)` in its own process in the bundle of the first stage, whose actors have ended.

    Returns its result; None once `should_cancel()`. Ray retries a process that dies, so the function must be repeatable.
    """
    bundle = PlacementGroupSchedulingStrategy(placement_group, placement_group_bundle_index=0)
    options = {"num_cpus": layout.cpus, "num_gpus": min(1.0, layout.gpus), "max_retries": 2}
    reference = ray.remote(function).options(scheduling_strategy=bundle, **options).remote(*args)
    try:
        while not ray.wait([reference], timeout=0.5, fetch_local=False)[0]:
            raise_if_cluster_lost()
            if should_cancel():
                ray.cancel(reference, force=True)
                return None
    except ClusterLostError:
        raise  # nobody is there to cancel it
    except Exception:
        ray.cancel(reference, force=True)
        raise
    result: Result = result_of(reference)
    return result


def result_of(reference: Any) -> Any:
    """The result of a remote call.

    Raises:
        Exception: the original error of the call, without Ray's wrapper.
        TrainingError: its process died.
    """
    try:
        return task_result(reference)
    except RayTaskError:
        raise
    except RayError as error:
        raise died(error) from error


def died(error: RayError) -> TrainingError:
    """What ends a run whose measurement lost its process, of which Ray tells by this error."""
    return TrainingError(f"a process that measures died: {exit_reason(error)}; --resume measures again")


def task_result(reference: Any) -> Any:
    """`result_of`, which raises Ray's own error if the process of the call died."""
    try:
        while not ray.wait([reference], timeout=1, fetch_local=False)[0]:
            raise_if_cluster_lost()
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, Exception):
            raise error.cause from error
        raise


def gcs_is_reachable() -> bool:
    """Whether the head of the connected cluster answers; Ray's calls wait a minute for it, then end this process."""
    return is_reachable(str(ray.get_runtime_context().gcs_address))


def cluster_resources() -> ClusterResources:
    """CPUs, GPUs and nodes of the connected cluster."""
    resources = ray.cluster_resources()
    nodes = sum(bool(node["Resources"].get("CPU")) for node in alive_nodes())
    return ClusterResources(float(resources.get("CPU", 0.0)), float(resources.get("GPU", 0.0)), max(1, nodes))


def alive_nodes() -> list[dict[str, Any]]:
    """Ray's records of the nodes that are alive; empty without a connection."""
    return [node for node in ray.nodes() if node["Alive"]] if ray.is_initialized() else []
