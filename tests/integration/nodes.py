"""A Ray cluster of several nodes on this machine: a raylet each, with a folder that no other node sees, and a shared one."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import ray

from bim.orchestrator.benchmarks.fault_job import command

STORE = 80 << 20
"""Bytes of a node's object store."""


def can_mount() -> bool:
    unshare = shutil.which("unshare")
    return unshare is not None and subprocess.run([unshare, "--mount", "true"], check=False).returncode == 0


NEEDS_MOUNTS = pytest.mark.skipif(
    not can_mount(), reason="a node's own folder needs the right to make mount namespaces"
)


@dataclass
class Node:
    """A raylet and the processes below it."""

    process: subprocess.Popen[bytes]
    node_id: str = ""

    def raylet(self) -> psutil.Process:
        (raylet,) = [
            child
            for child in psutil.Process(self.process.pid).children(recursive=True)
            if child.name() == "raylet"
        ]
        return raylet

    def kill(self) -> None:
        """As if the machine were switched off."""
        kill_tree(self.process)


@dataclass
class Nodes:
    """The cluster.

    Args:
        folder: short, for it holds Unix sockets.
        shared: a folder that all nodes see.
        private: an empty folder of which every worker node has its own.
    """

    folder: Path
    shared: Path
    private: Path
    address: str
    head: subprocess.Popen[bytes]
    workers: list[Node] = field(default_factory=list)

    def add(self, cpus: int = 1) -> Node:
        """Start a worker node and wait until it has joined."""
        before = node_ids()
        start = [
            ray_command(), "start", "--block", f"--address={self.address}", f"--num-cpus={cpus}",
            f"--object-store-memory={STORE}", f"--temp-dir={self.folder}",
        ]  # fmt: skip
        mount = 'mount -t tmpfs none "$0" && exec "$@"'
        log = self.folder / f"node-{len(self.workers)}.log"
        process = start_process(["unshare", "--mount", "sh", "-c", mount, str(self.private), *start], log)
        self.workers.append(Node(process))
        wait_until(lambda: bool(node_ids() - before) or process.poll() is not None, 300)
        assert process.poll() is None, log.read_text()
        (self.workers[-1].node_id,) = node_ids() - before
        return self.workers[-1]


def node_ids() -> set[str]:
    """Of the nodes that are alive, the head among them."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


@contextmanager
def several_nodes(cpus: tuple[int, ...]) -> Iterator[Nodes]:
    """A head without CPUs and worker nodes with these; this process is connected. All of it is gone afterward."""
    folder = Path(tempfile.mkdtemp(prefix="bim", dir="/tmp"))
    port, client_port = two_free_ports()
    address = f"{ray.util.get_node_ip_address()}:{port}"
    shared, private = folder / "shared", folder / "private"
    shared.mkdir()
    private.mkdir()
    log = folder / "head.log"
    head = start_process(
        [
            ray_command(), "start", "--head", "--block", f"--port={port}", f"--ray-client-server-port={client_port}",
            "--num-cpus=0", f"--object-store-memory={STORE}", "--include-dashboard=false", f"--temp-dir={folder}",
        ],
        log,
    )  # fmt: skip
    nodes = Nodes(folder, shared, private, address, head)
    try:
        wait_until(lambda: "Ray runtime started" in log.read_text() or head.poll() is not None, 180)
        assert head.poll() is None, log.read_text()
        ray.shutdown()
        ray.init(address, log_to_driver=False, logging_level="ERROR")
        for count in cpus:
            nodes.add(count)
        yield nodes
    finally:
        ray.shutdown()
        kill_all(head, folder)
        shutil.rmtree(folder, ignore_errors=True)


def started_job(nodes: Nodes, out: Path, *words: str, joins: bool = True) -> subprocess.Popen[str]:
    """The main job as a driver of its own, on the cluster or with a Ray of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {"RAY_ADDRESS": nodes.address} if joins else {}
    argv = command(out, f"sqlite:///{out.parent}/{out.name}.db", out.name, "--resume" in words)
    return subprocess.Popen(
        [*argv, *(word for word in words if word != "--resume")],
        cwd=nodes.folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_process(argv: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as out:
        return subprocess.Popen(
            argv,
            env=os.environ | {"RAY_raylet_start_wait_time_s": "240"},  # on a loaded machine
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def ray_command() -> str:
    return str(Path(sys.executable).with_name("ray"))


def wait_until(done: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"not so within {seconds:.0f} s"
        time.sleep(0.5)


def two_free_ports() -> tuple[int, int]:
    with closing(socket.socket()) as first, closing(socket.socket()) as second:
        for taken in (first, second):
            taken.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and everything below it."""
    if process.poll() is None:
        below = psutil.Process(process.pid).children(recursive=True)
        for each in [psutil.Process(process.pid), *below]:
            try:
                each.kill()
            except psutil.NoSuchProcess:
                continue
    process.wait(10)


def kill_all(head: subprocess.Popen[bytes], folder: Path) -> None:
    """Kill the head's processes and those of the nodes, which outlive it and name its folder."""
    ours = set[psutil.Process]()
    if head.poll() is None:
        process = psutil.Process(head.pid)
        ours = {process, *process.children(recursive=True)}
    for process in psutil.process_iter():
        try:
            if str(folder) in " ".join(process.cmdline()):
                ours |= {process, *process.children(recursive=True)}
        except psutil.Error:
            continue  # gone meanwhile
    for process in ours:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(ours, timeout=10)
    head.wait(10)
