"""A Ray of this machine cannot be reached by others, and leaves nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

RAY_SCRIPT = """
import os, sys
from bim.orchestrator.distributed.local_ray import secure_local_ray
secure_local_ray()
import psutil
from bim.orchestrator.distributed.cluster import ray_cluster
with ray_cluster():
    import ray
    family = {p.pid for p in psutil.Process().children(recursive=True)} | {os.getpid()}
    listening = {c.laddr.ip for c in psutil.net_connections("inet") if c.status == "LISTEN" and c.pid in family}
    print(sorted(listening), ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.readline()
left = [p for p in family - {os.getpid()} if psutil.pid_exists(p) and psutil.Process(p).status() != "zombie"]
print("left", left, flush=True)
"""

STRANGER = "import ray; ray.init(address={address!r})"


@pytest.mark.nightly
def test_a_stranger_cannot_join_and_nothing_is_left(tmp_path: Path) -> None:
    """Another user of the machine has no token; another machine finds nothing that listens. Its TMPDIR is a long one."""
    long = tmp_path / ("slurm-job-" * 6)
    long.mkdir()
    free = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    environment = free | {"HOME": str(tmp_path), "TMPDIR": str(long)}
    with subprocess.Popen(
        [sys.executable, "-c", RAY_SCRIPT],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as driver:
        assert driver.stdin is not None
        assert driver.stdout is not None
        listening, address = driver.stdout.readline().rsplit(" ", 1)
        assert "127.0.0.1" in listening
        assert all(ip.endswith("127.0.0.1") for ip in eval(listening))
        stranger = subprocess.run(
            [sys.executable, "-c", STRANGER.format(address=address.strip())],
            env=free
            | {"HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"},
            capture_output=True,
            check=False,
            timeout=120,
        )
        assert stranger.returncode != 0
        driver.stdin.write("\n")
        driver.stdin.flush()
        assert driver.stdout.readline() == "left []\n"
    assert not (tmp_path / ".ray").exists()
