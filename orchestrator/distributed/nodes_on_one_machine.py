"""A Ray cluster of several nodes on one machine, some of which are lost; serves the benchmark of faults."""

from __future__ import annotations

import subprocess
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group_table

from bim.orchestrator.signal_masks import kept_signal_handlers

WORKER_NODES, CPUS_PER_NODE = 3, 2
"""Two nodes hold the stages and the loader of the job; the third is the spare."""


class NodesOnOneMachine:
    """A head without CPUs and some worker nodes, each a raylet of its own on this machine."""

    def __init__(self) -> None:
        with kept_signal_handlers():  # Ray's would drain the node for half a minute
            self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        self.address = str(self._cluster.address)
        self._nodes: list[Any] = []
        self.complete()

    def complete(self) -> None:
        """Replace the nodes whose raylet was killed."""
        for node in [node for node in self._nodes if _raylet(node).poll() is not None]:
            self._nodes.remove(node)
            self._cluster.remove_node(node, allow_graceful=False)
        with kept_signal_handlers():
            while len(self._nodes) < WORKER_NODES:
                self._nodes.append(
                    self._cluster.add_node(num_cpus=CPUS_PER_NODE, object_store_memory=80 << 20)
                )

    def raylets(self) -> list[int]:
        """Process ids of the raylets of the worker nodes that are alive."""
        return [_raylet(node).pid for node in self._nodes if _raylet(node).poll() is None]

    def placement_groups(self) -> list[str]:
        """The placement groups that exist."""
        # Not connected for longer: Ray prints pages for every raylet that dies.
        ray.init(self.address, log_to_driver=False, logging_level="ERROR")
        try:
            table = placement_group_table().values()
        finally:
            ray.shutdown()
        return [
            f"placement group {group['placement_group_id']}" for group in table if group["state"] != "REMOVED"
        ]

    def close(self) -> None:
        """End all of it."""
        self._cluster.shutdown()


def _raylet(node: Any) -> subprocess.Popen[bytes]:
    process: subprocess.Popen[bytes] = node.all_processes["raylet"][0].process
    return process
