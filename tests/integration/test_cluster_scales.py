"""The machines of the shipped cluster.yaml, without GPUs and as processes here, under Ray's real autoscaler.

What a cloud would do is not tried: the provider is Ray's own imitation, which starts a raylet where a cloud starts a
machine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from bim.orchestrator.distributed.cluster import ray_cluster
from bim.orchestrator.distributed.placement import StageLayout
from bim.orchestrator.distributed.ray_stage_group import RayStages
from tests.integration.nodes import kill_all, two_free_ports, wait_until
from tests.integration.tiny import data, differing, in_process, state, tiny_spec, train

ROOT = Path(__file__).parents[2]
HEAD = "ray.head.default"  # the imitation knows the head by this name alone
HEAD_ID = "f" * 51 + "00000"
STEPS = 20


def imitation(address: str) -> dict[str, Any]:
    """The shipped file on the imitated provider: the same node types, small and without GPUs, growing on demand."""
    shipped = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    types = shipped["available_node_types"]
    head, worker = types.pop(shipped["head_node_type"]), types.pop("gpu_worker")
    assert not types
    resources = {"CPU": 2, "object_store_memory": 128 << 20}
    small = worker | {"resources": resources, "node_config": {}, "min_workers": 0}
    return shipped | {
        "provider": {
            # Not "type: fake_multinode": Ray's wheel lacks the file of defaults that belongs to that name.
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": address,
            "launch_multiple": True,  # as many as asked, as a cloud does
            "disable_node_updaters": True,
            "use_node_id_as_ip": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {
            HEAD: head | {"node_config": {}, "min_workers": 0, "max_workers": 0},
            "gpu_worker": small,
        },
        "head_node_type": HEAD,
        "idle_timeout_minutes": 0.1,
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_filter": [],
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }


@pytest.fixture
def growing_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A head with its autoscaler; every process of it is gone afterward, in whatever state the test left it."""
    folder = Path(tempfile.mkdtemp(prefix="bim", dir="/tmp"))  # short: it holds Unix sockets
    port, client_port = two_free_ports()
    address = f"{ray.util.get_node_ip_address()}:{port}"
    config = folder / "cluster.yaml"
    config.write_text(yaml.safe_dump(imitation(address)), encoding="utf-8")
    environment = os.environ | {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_NODE_TYPE_NAME": HEAD,
        "RAY_enable_autoscaler_v2": "1",  # as `ray up` starts it
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    log = folder / "head.log"
    start = [
        "start", "--head", "--block", f"--port={port}", f"--ray-client-server-port={client_port}",
        "--num-cpus=0", f"--object-store-memory={128 << 20}",
        "--include-dashboard=false", f"--temp-dir={folder}", f"--autoscaling-config={config}",
    ]  # fmt: skip
    with log.open("w") as out:
        head = subprocess.Popen(
            [Path(sys.executable).with_name("ray"), *start],
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until(lambda: "Ray runtime started" in log.read_text() or head.poll() is not None, 180)
        assert head.poll() is None, log.read_text()
        monkeypatch.setenv("RAY_ADDRESS", address)
        yield
    finally:
        ray.shutdown()
        kill_all(head, folder)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.usefixtures("growing_cluster")
def test_a_job_makes_the_cluster_grow_trains_across_machines_and_lets_it_shrink(tmp_path: Path) -> None:
    spec = tiny_spec(blocks=2)
    # No machine holds both stages.
    layout = StageLayout(((0,), (1,)), gpus=0.0, cpus=1.5, loader_cpus=0.5, threads=1)
    with ray_cluster() as have:
        assert (have.cpus, machines()) == (0.0, 1)
        (tmp_path / "ray").mkdir()
        stages = RayStages(spec, data(), layout, shared=tmp_path / "ray", wait_s=180)
        train(stages, tmp_path / "ray", steps=STEPS)
        assert machines() == 3
        stages.close()
        wait_until(lambda: machines() == 1, 180)
    train(in_process(spec, stages=2), tmp_path / "alone", steps=STEPS)
    assert differing(state(tmp_path / "ray", STEPS, 2), state(tmp_path / "alone", STEPS, 2)) == []


def machines() -> int:
    """Nodes of the cluster that are alive, the head among them."""
    return sum(node["Alive"] for node in ray.nodes())
