"""What an interrupted run lives on and a kill takes away: an MLflow server, and a Ray cluster of several nodes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psutil
from mlflow import MlflowClient

START_TIMEOUT_S = 180.0

WORKER_NODES, CPUS_PER_NODE = 3, 2
"""Two nodes hold the stages and the loader of the job; the third is the spare."""


class MlflowServer:
    """An MLflow server with a store below a folder; killed and started again, it keeps its address and what it holds."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._port = folder, free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.uri = f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Start it, without waiting until it answers."""
        self._process = subprocess.Popen(
            [
                sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port),
                "--workers", "1", "--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db",
                "--artifacts-destination", str(self._folder / "artifacts"),
            ],
            cwd=self._folder,
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdin=subprocess.DEVNULL,
            stdout=(self._folder / "server.log").open("ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip

    def client(self) -> MlflowClient:
        """A client of the server. Raises TimeoutError if it does not answer within `START_TIMEOUT_S`."""
        client = MlflowClient(tracking_uri=self.uri)
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", self._port), timeout=1).close()
                return client
            if time.monotonic() > deadline:
                raise TimeoutError(f"the MLflow server did not start; see {self._folder}/server.log")
            time.sleep(0.2)

    def processes(self) -> list[psutil.Process]:
        """The server itself, if it runs."""
        assert self._process is not None
        return [psutil.Process(self._process.pid)] if self._process.poll() is None else []

    def kill(self) -> None:
        """Kill it with all its worker processes, as when memory runs out."""
        assert self._process is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class NodesOnOneMachine:
    """A head without CPUs and some worker nodes, each a raylet of its own on this machine."""

    def __init__(self) -> None:
        import ray
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        self.address = str(self._cluster.address)
        self._nodes: list[Any] = []
        self.complete()
        ray.init(self.address, log_to_driver=False, logging_level="ERROR")

    def complete(self) -> None:
        """Replace the nodes whose raylet was killed."""
        for node in [node for node in self._nodes if _raylet(node).poll() is not None]:
            self._nodes.remove(node)
            self._cluster.remove_node(node, allow_graceful=False)
        while len(self._nodes) < WORKER_NODES:
            self._nodes.append(self._cluster.add_node(num_cpus=CPUS_PER_NODE, object_store_memory=80 << 20))

    def raylets(self) -> list[int]:
        """Process ids of the raylets of the worker nodes that are alive."""
        return [_raylet(node).pid for node in self._nodes if _raylet(node).poll() is None]

    def placement_groups(self) -> list[str]:
        """The placement groups that exist."""
        from ray.util import placement_group_table

        table = placement_group_table().values()
        return [
            f"placement group {group['placement_group_id']}" for group in table if group["state"] != "REMOVED"
        ]

    def close(self) -> None:
        import ray

        ray.shutdown()
        self._cluster.shutdown()


def _raylet(node: Any) -> subprocess.Popen[bytes]:
    process: subprocess.Popen[bytes] = node.all_processes["raylet"][0].process
    return process


def free_port() -> int:
    """A port of the loopback interface that no process listens on."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
