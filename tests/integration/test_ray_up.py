"""The shipped cluster.yaml by a real `ray up`, `ray submit` and `ray down` over ssh, this machine being its three machines.

The provider is `local`, as the file's comments describe it, and its machines are 127.0.0.x; what installs packages is left
out, the present environment takes its place. `ray stop` ends the processes of this test alone.
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import yaml

from bim.orchestrator.benchmarks.fault_job import JOB

ROOT = Path(__file__).parents[2]
SEARCH_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
MISSING = [
    name for name in ("sshd", "ssh", "ssh-keygen", "rsync") if shutil.which(name, path=SEARCH_PATH) is None
]

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)} (Debian: openssh-server, rsync)"),
]

WORKERS = ("127.0.0.2", "127.0.0.3")


class Machines:
    """Three machines that are this one, reached through a server of ssh of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.head = folder, str(ray.util.get_node_ip_address())
        self.home, self.shared, self.bin = folder / "home", folder / "shared", folder / "bin"
        for path in (self.home, self.shared, self.bin):
            path.mkdir()
        self.ssh_port, self.gcs_port = free_port(), free_port()
        self.key = folder / "key"
        for key in (self.key, folder / "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        self.sshd = self._start_sshd()
        # Ray takes no other port of ssh than 22, and its `ray stop` would end every Ray of this machine.
        self._script(
            "ssh",
            f"exec {shutil.which('ssh')} -F none -p {self.ssh_port} -o ControlMaster=no -o ControlPath=none "
            '-o LogLevel=ERROR -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null "$@"',
        )
        ray_command = Path(sys.executable).with_name("ray")
        stop = f"pkill -9 -f '{self.sessions}'; exit 0"
        self._script("ray", f'case "$1" in stop) {stop};; esac\nexec {ray_command} "$@"')
        # As ~/venv/bin of the file, for the shells of the machines.
        (self.home / ".bashrc").write_text(
            f"export PATH={self.bin}:{Path(sys.executable).parent}:$PATH PYTHONPATH={os.environ.get('PYTHONPATH', '')}\n"
            "export OMP_NUM_THREADS=1 RAY_USAGE_STATS_ENABLED=0 MLFLOW_DISABLE_TELEMETRY=true\n"
            "export RAY_raylet_start_wait_time_s=240\n"  # on a loaded machine
        )
        self.environment = {key: value for key, value in os.environ.items() if key != "RAY_AUTH_MODE"}
        self.environment |= {
            "PATH": f"{self.bin}:{SEARCH_PATH}",
            "HOME": str(self.home),
            "RAY_UP_enable_autoscaler_v2": "0",
        }
        self.config = folder / "cluster.yaml"
        self.config.write_text(yaml.safe_dump(self._configuration()), encoding="utf-8")

    @property
    def sessions(self) -> str:
        """A part of the command lines of Ray's own processes on these machines."""
        return f"{self.folder}/ray/session_"

    def ray(self, *words: str, timeout_s: float = 600) -> subprocess.CompletedProcess[str]:
        """A `ray` command of the user."""
        return subprocess.run(
            ["ray", *words],
            cwd=ROOT,
            env=self.environment,
            executable=self.bin / "ray",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def worker_raylets(self) -> list[psutil.Process]:
        """The raylets of the workers."""
        return [
            process
            for process in self.processes()
            if process.name() == "raylet" and any(ip in " ".join(process.cmdline()) for ip in WORKERS)
        ]

    def processes(self) -> list[psutil.Process]:
        """Ray's own processes on these machines."""
        ours = []
        for process in psutil.process_iter():
            try:
                if self.sessions in " ".join(process.cmdline()):
                    ours.append(process)
            except psutil.Error:
                continue
        return ours

    def close(self) -> None:
        ours = self.processes()
        for process in [*ours, psutil.Process(self.sshd.pid)]:
            below = process.children(recursive=True) if process.is_running() else []
            for each in [process, *below]:
                try:
                    each.kill()
                except psutil.NoSuchProcess:
                    continue
        self.sshd.wait(10)
        for state in Path("/tmp/ray").glob(f"cluster-{self.folder.name}*"):
            state.unlink(missing_ok=True)

    def _configuration(self) -> dict[str, Any]:
        """The shipped file for machines of one's own, as its comments tell, without what installs packages."""
        text = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
        own = "\n".join(
            line.removeprefix("# local| ") for line in text.splitlines() if line.startswith("# local| ")
        )
        config = yaml.safe_load(text) | yaml.safe_load(own)
        del config["available_node_types"], config["head_node_type"]
        config["cluster_name"] = self.folder.name
        config["provider"] |= {"head_ip": self.head, "worker_ips": list(WORKERS)}
        config["auth"] = {"ssh_user": getpass.getuser(), "ssh_private_key": str(self.key)}
        config["max_workers"] = len(WORKERS)
        config["cluster_synced_files"] = []
        config["initialization_commands"] = []
        config["setup_commands"] = [
            self._adapted(line) for line in config["setup_commands"] if "bim-shell" in line
        ]
        config["head_setup_commands"] = [
            self._adapted(line)
            for line in config["head_setup_commands"]
            if re.match("mkdir|ray get-auth-token", line)
        ]
        head, worker = (
            self._adapted(config[f"{machine}_start_ray_commands"][-1]) for machine in ("head", "worker")
        )
        common = f" --num-cpus=2 --object-store-memory={80 << 20} --temp-dir={self.folder}/ray"
        config["head_start_ray_commands"] = [head + common + f" --node-ip-address={self.head}"]
        # On this machine a worker knows itself by the address that ssh reached it at.
        config["worker_start_ray_commands"] = [
            f"{worker} --num-cpus=2 --object-store-memory={80 << 20} "
            "--node-ip-address=$(echo $SSH_CONNECTION | cut -d ' ' -f 3)"
        ]
        return dict(config)

    def _adapted(self, command: str) -> str:
        """A command of the shipped file with the folders and the ports of this test."""
        command = command.replace("/shared", str(self.shared)).replace("$HOME/venv/bin:", "")
        command = command.replace("6379", str(self.gcs_port)).replace(" --object-manager-port=8076", "")
        # "auto" could be another cluster on this machine.
        command = command.replace("RAY_ADDRESS=auto", f"RAY_ADDRESS={self.head}:{self.gcs_port}")
        return command.replace("--dashboard-host=127.0.0.1", "--include-dashboard=false")

    def _start_sshd(self) -> subprocess.Popen[bytes]:
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        configuration = self.folder / "sshd_config"
        listen = "".join(f"ListenAddress {ip}\n" for ip in ("127.0.0.1", self.head, *WORKERS))
        configuration.write_text(
            f"Port {self.ssh_port}\n{listen}HostKey {self.folder}/host_key\nPidFile none\nStrictModes no\n"
            f"AuthorizedKeysFile {self.key}.pub\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
            f"UsePAM no\nMaxStartups 100\nMaxSessions 100\nSetEnv HOME={self.home}\n"
        )
        sshd = shutil.which("sshd", path=SEARCH_PATH)
        assert sshd is not None
        return subprocess.Popen(
            [sshd, "-D", "-f", configuration, "-E", self.folder / "sshd.log"], stdin=subprocess.DEVNULL
        )

    def _script(self, name: str, text: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)


@pytest.fixture
def machines() -> Iterator[Machines]:
    folder = Path(tempfile.mkdtemp(prefix="bimup", dir="/tmp"))  # short: it holds Unix sockets
    machines = Machines(folder)
    try:
        yield machines
    finally:
        machines.close()
        shutil.rmtree(folder, ignore_errors=True)


def test_the_shipped_cluster_comes_up_runs_a_job_loses_a_worker_and_goes_down(machines: Machines) -> None:
    up = machines.ray("up", "-y", "--no-config-cache", str(machines.config))
    assert up.returncode == 0, up.stdout
    wait_until(lambda: len(machines.worker_raylets()) == len(WORKERS), 300)

    words = [word for key, value in JOB.items() for word in (f"--{key}", value)]
    quoted = [f"'{word}'" if " " in word else word for word in words]
    lost: list[int] = []

    def lose_a_worker() -> None:
        """Kill the raylet of a worker on which a stage lives, once a checkpoint is there."""
        wait_until(lambda: any(machines.shared.glob("runs/up/checkpoints/*/manifest.json")), 400)
        for raylet in machines.worker_raylets():
            if any("ray::StageActor" in " ".join(child.cmdline()) for child in raylet.children()):
                raylet.kill()
                lost.append(raylet.pid)
                return

    loser = threading.Thread(target=lose_a_worker)
    loser.start()
    run = machines.ray(
        "submit", str(machines.config), str(ROOT / "pipelines" / "bim_pipeline.py"), "--",
        *quoted, "--out", "runs/up", "--placement.wait_s", "200",
    )  # fmt: skip
    loser.join()
    assert run.returncode == 0, run.stdout
    assert lost
    assert "rewinding" in run.stdout
    assert (machines.shared / "runs" / "up" / "summary.json").exists()

    down = machines.ray("down", "-y", str(machines.config))
    assert down.returncode == 0, down.stdout
    wait_until(lambda: machines.processes() == [], 120)


def wait_until(done: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"not so within {seconds:.0f} s"
        time.sleep(0.5)


def free_port() -> int:
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
