"""Training over several nodes of one cluster: nodes that are lost, join late or are drained, and jobs side by side.

Each node is a raylet on this machine, with a folder of its own (a mount namespace) and one that all of them share.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from bim.orchestrator.distributed.placement import PlacementError, StageLayout
from bim.orchestrator.distributed.ray_stage_group import RayStages
from bim.orchestrator.training.callbacks import StopRequest
from bim.orchestrator.training.checkpoint import CheckpointStore
from bim.orchestrator.training.errors import TrainingError
from tests.integration.nodes import (
    NEEDS_MOUNTS,
    Node,
    Nodes,
    node_ids,
    ray_command,
    several_nodes,
    started_job,
    wait_until,
)
from tests.integration.tiny import AtStep, data, differing, in_process, state, tiny_spec, train

STEPS = 60

TWO_NODES = StageLayout(((0,), (1,)), gpus=0.0, cpus=0.6, loader_cpus=0.4, threads=1)
"""Two stages that do not fit on one node of one CPU."""


pytestmark = [
    pytest.mark.nightly,
    NEEDS_MOUNTS,
]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training in this process."""
    out = tmp_path_factory.mktemp("unbroken")
    train(in_process(tiny_spec(blocks=2), stages=2), out, steps=STEPS)
    return out


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    with several_nodes((1, 1)) as nodes:
        yield nodes


@pytest.fixture
def nodes(cluster: Nodes) -> Iterator[Nodes]:
    """Two worker nodes; what a test adds or loses is put right after it."""
    yield cluster
    for node in cluster.workers[2:]:
        node.kill()
    alive = [node for node in cluster.workers[:2] if node.process.poll() is None]
    cluster.workers[:] = alive
    wait_until(lambda: len(node_ids()) == 1 + len(alive), 60)
    while len(cluster.workers) < 2:
        cluster.add()


def group(nodes: Nodes, name: str, wait_s: float = 60.0) -> tuple[RayStages, Path]:
    out = nodes.shared / name
    out.mkdir()
    return RayStages(tiny_spec(blocks=2), data(), TWO_NODES, shared=out, wait_s=wait_s), out


def node_of(nodes: Nodes, pid: int) -> Node:
    """The node on which a process lives."""
    above = {process.pid for process in psutil.Process(pid).parents()}
    (node,) = [node for node in nodes.workers if node.process.pid in above]
    return node


def once_at(step: int, act: Callable[[], None]) -> AtStep:
    """Calls `act` when a step is logged for the first time."""
    pending = [act]

    def at_step(number: int) -> None:
        if number >= step and pending:
            pending.pop()()

    return AtStep(at_step)


def test_each_block_has_a_node_and_a_lost_node_is_replaced_by_the_spare(
    nodes: Nodes, unbroken: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nodes.add()
    stages, out = group(nodes, "spare")
    homes: list[int] = []

    def lose_a_node() -> None:
        homes.extend(node_of(nodes, pid).process.pid for pid in stages.pids())
        node_of(nodes, stages.pids()[2]).kill()

    try:
        result = train(stages, out, steps=STEPS, callback=once_at(30, lose_a_node), max_restarts=1)
    finally:
        stages.close()
    loader, first, second = homes
    assert loader == first != second
    assert result.restarts == 1
    assert "stage 1 (block 1)" in caplog.text
    assert differing(state(unbroken, STEPS, 2), state(out, STEPS, 2)) == []


def test_without_a_spare_the_run_ends_and_continues_when_a_node_has_joined(
    nodes: Nodes, unbroken: Path
) -> None:
    stages, out = group(nodes, "no-spare", wait_s=5.0)

    def lose_a_node() -> None:
        node_of(nodes, stages.pids()[2]).kill()

    try:
        with pytest.raises((TrainingError, PlacementError), match=r"is lost, with it .*no node with"):
            train(stages, out, steps=STEPS, callback=once_at(30, lose_a_node), max_restarts=1)
    finally:
        stages.close()
    nodes.add()
    stages = RayStages(tiny_spec(blocks=2), data(), TWO_NODES, shared=out, wait_s=60.0)
    try:
        train(stages, out, steps=STEPS)
    finally:
        stages.close()
    assert differing(state(unbroken, STEPS, 2), state(out, STEPS, 2)) == []


def test_the_wait_for_another_node_is_told_and_obeys_a_stop(
    nodes: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    stages, out = group(nodes, "stopped", wait_s=120.0)
    stop, stopped_at = StopRequest(), list[float]()

    def is_told() -> bool:
        return any("waiting up to 120 s for a node" in text for text in caplog.messages)

    def request_stop() -> None:
        wait_until(is_told, 60)
        stopped_at.append(time.monotonic())
        stop.reason = "SIGTERM"

    def lose_a_node() -> None:
        node_of(nodes, stages.pids()[2]).kill()
        threading.Thread(target=request_stop).start()

    try:
        result = train(stages, out, steps=STEPS, callback=once_at(30, lose_a_node), stop=stop, max_restarts=1)
        assert time.monotonic() - stopped_at[0] < 10
    finally:
        stages.close()
    assert result.stopped == "SIGTERM"
    assert any("is lost, with it" in text and "stage 1 (block 1)" in text for text in caplog.messages)
    assert caplog.messages[-1] == "stopping without a new checkpoint; last checkpoint: step 20"


def test_a_node_that_joins_while_the_run_waits_is_used(nodes: Nodes, unbroken: Path) -> None:
    nodes.workers[1].kill()
    wait_until(lambda: len(node_ids()) == 2, 60)
    stages, out = group(nodes, "late")
    trained = threading.Thread(target=train, args=(stages, out, STEPS))
    trained.start()
    time.sleep(3)
    assert stages.pids() == []
    nodes.add()
    trained.join(180)
    stages.close()
    assert differing(state(unbroken, STEPS, 2), state(out, STEPS, 2)) == []


def test_a_node_that_is_drained_and_taken_away_is_a_lost_node(nodes: Nodes, tmp_path: Path) -> None:
    """What a cloud does with a preempted machine: a warning to the cluster, then the end."""
    steps = 5 * STEPS  # the job is at work when the node goes
    train(in_process(tiny_spec(blocks=2), stages=2), tmp_path, steps=steps)
    nodes.add()
    stages, out = group(nodes, "drained")

    def drain() -> None:
        node = node_of(nodes, stages.pids()[2])
        drained = subprocess.run(
            [
                ray_command(), "drain-node", f"--address={nodes.address}", f"--node-id={node.node_id}",
                "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=preempted",
                "--deadline-remaining-seconds=30",
            ],
            capture_output=True,
            text=True,
            check=False,
        )  # fmt: skip
        assert drained.returncode == 0, drained.stderr
        threading.Timer(2.0, node.kill).start()

    try:
        result = train(stages, out, steps=steps, callback=once_at(30, drain), max_restarts=1)
    finally:
        stages.close()
    assert result.restarts == 1
    assert differing(state(tmp_path, steps, 2), state(out, steps, 2)) == []


def test_an_output_directory_that_a_node_does_not_see_is_refused(nodes: Nodes) -> None:
    stages = RayStages(tiny_spec(blocks=2), data(), TWO_NODES, shared=nodes.private)
    try:
        with pytest.raises(
            PlacementError, match=r"not visible on the node of stage 0.*storage that all nodes share"
        ):
            train(stages, nodes.private, steps=STEPS)
    finally:
        stages.close()


def checksums(out: Path) -> list[int]:
    """Of the files of the last checkpoint."""
    manifest = CheckpointStore(out).latest()
    assert manifest is not None
    return [record.crc32 for record in manifest.files]


def test_two_jobs_on_one_cluster_do_not_disturb_each_other(nodes: Nodes) -> None:
    nodes.add(cpus=4)
    outs = [nodes.shared / "first", nodes.shared / "second"]
    jobs = [started_job(nodes, out, "--placement.cpus_per_stage", "0.3") for out in outs]
    for job in jobs:
        text, _ = job.communicate(timeout=600)
        assert job.returncode == 0, text
    first, second = map(checksums, outs)
    assert first == second
