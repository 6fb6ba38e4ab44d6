"""Calls in a process beside the stages: one process for all, of which nothing is reserved while it waits."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress

import psutil
import pytest
import ray

from bim.orchestrator.distributed.placement import StageLayout
from bim.orchestrator.distributed.placement_group import (
    PlacementGroup,
    create_placement_group,
    release_placement_group,
)
from bim.orchestrator.distributed.side_task import SideProcess, SideTask
from bim.orchestrator.training.errors import TrainingError

pytestmark = pytest.mark.usefixtures("ray_cluster")

LAYOUT = StageLayout(((0,),), gpus=0.0, cpus=0.5, loader_cpus=0.5, threads=1)


@pytest.fixture
def group() -> Iterator[PlacementGroup]:
    """One of two CPUs."""
    group = create_placement_group(LAYOUT, timeout_s=60)
    assert group is not None
    yield group
    release_placement_group(group)


@pytest.fixture
def process(group: PlacementGroup) -> Iterator[SideProcess]:
    process = SideProcess(LAYOUT, group)
    yield process
    process.close()


def result(task: SideTask[int] | None) -> int:
    assert task is not None
    return task.result()


def beside(process: SideProcess) -> int:
    """The id of the process that a call beside the first stage has."""
    return process.start_beside_first_stage(os.getpid).result()


def free_cpus() -> float:
    return float(ray.available_resources().get("CPU", 0.0))


def wait_for_cpus(cpus: float) -> None:
    """Ray tells what is free with a delay."""
    end = time.monotonic() + 20
    while free_cpus() != cpus:
        assert time.monotonic() < end, free_cpus()
        time.sleep(0.1)


def test_a_process_serves_all_calls_and_holds_a_cpu_during_a_call_alone(process: SideProcess) -> None:
    wait_for_cpus(1.0)
    first = result(process.start_in_free_resources(os.getpid))
    wait_for_cpus(1.0)
    busy = process.start_in_free_resources(time.sleep, 3.0)
    assert busy is not None
    wait_for_cpus(0.0)
    assert not busy.is_done()
    assert process.start_in_free_resources(os.getpid) is None
    busy.result()
    wait_for_cpus(1.0)
    assert result(process.start_in_free_resources(os.getpid)) == first
    assert beside(process) == first
    process.close()
    with suppress(psutil.NoSuchProcess):
        psutil.Process(first).wait(5)


def test_after_a_cancel_or_a_death_there_is_another_process(process: SideProcess) -> None:
    first = beside(process)
    process.start_beside_first_stage(time.sleep, 60).cancel()
    second = beside(process)
    os.kill(second, signal.SIGKILL)  # while it waits: no call is lost
    with suppress(psutil.NoSuchProcess):
        psutil.Process(second).wait(5)
    third = beside(process)
    assert len({first, second, third}) == 3
    with pytest.raises(TrainingError, match=r"^its process died: "):
        process.start_beside_first_stage(os.kill, third, signal.SIGKILL).result()
    assert process._actor is None
