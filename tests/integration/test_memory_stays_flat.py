"""Nothing piles up: memory, handles and threads of driver, loader, data workers and stages, and what the object store holds,
late in a run against early in it.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import ray

from bim.orchestrator.distributed.ray_stage_group import RayStages
from bim.orchestrator.training.spec import DecoderSpec
from tests.integration.tiny import AtStep, data, layout, tiny_spec, train

pytestmark = pytest.mark.usefixtures("ray_cluster")


@dataclass(frozen=True)
class ProcessUse:
    """What a process holds.

    Args:
        uss: bytes that would be freed with it; shared memory of the object store does not count.
        handles: open files, sockets and pipes.
    """

    uss: int
    handles: int
    threads: int


@dataclass(frozen=True)
class Sample:
    """What a run holds at one step: each process by its name, and the object store of the node."""

    processes: dict[str, ProcessUse]
    store_bytes: int
    store_objects: int


def use_of(pid: int) -> ProcessUse:
    process = psutil.Process(pid)
    return ProcessUse(process.memory_full_info().uss, process.num_fds(), process.num_threads())


def sample(stages: RayStages) -> Sample:
    from ray._private.internal_api import node_stats

    loader, *pids = stages.pids()
    processes = {"driver": use_of(psutil.Process().pid), "loader": use_of(loader)}
    processes |= {f"stage {i}": use_of(pid) for i, pid in enumerate(pids)}
    workers = psutil.Process(loader).children()
    processes |= {f"data worker {i}": use_of(child.pid) for i, child in enumerate(workers)}
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    store = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"]).store_stats
    return Sample(processes, store.object_store_bytes_used, store.num_local_objects)


def samples(out: Path, steps: int, at: Collection[int]) -> list[Sample]:
    """Train a model so small that a step is mostly the machinery's, and look at it after some steps."""
    small = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 1}
    spec = tiny_spec(model_args=small, mask_ratios=(0.5,) * 4, decoders=(DecoderSpec(1, 16, 1),) * 4)
    stages = RayStages(spec, data(), layout(), shared=out)
    taken: list[Sample] = []

    def at_step(step: int) -> None:
        if step in at:
            taken.append(sample(stages))

    try:
        train(stages, out, steps=steps, every=250, callback=AtStep(at_step))
    finally:
        stages.close()
    assert len(taken) == len(at)
    return taken


def median(taken: Sequence[Sample], name: str, field: str) -> float:
    return statistics.median(getattr(each.processes[name], field) for each in taken)


@pytest.mark.nightly  # minutes for what the soak below shows too, and shows of more
def test_private_memory_at_step_2000_is_within_5_percent_of_step_500(tmp_path: Path) -> None:
    early, late = samples(tmp_path, 2000, (500, 2000))
    growth = {name: late.processes[name].uss / use.uss for name, use in early.processes.items()}
    print({name: f"{value:.3f}" for name, value in growth.items()})
    assert all(value < 1.05 for value in growth.values()), growth


@pytest.mark.nightly
def test_a_soak_of_3000_steps_holds_as_much_at_its_end_as_early_on(tmp_path: Path) -> None:
    at = [*range(500, 1000, 50), *range(2500, 3000, 50)]
    taken = samples(tmp_path, 3000, at)
    early, late = taken[:10], taken[10:]
    for name in early[0].processes:
        before, after = (
            {field: median(group, name, field) for field in ("uss", "handles", "threads")}
            for group in (early, late)
        )
        print(name, before, after)
        assert after["uss"] < 1.05 * before["uss"], name
        assert after["handles"] <= before["handles"] + 1, name
        assert after["threads"] <= before["threads"] + 1, name
    for field in ("store_bytes", "store_objects"):
        before, after = (max(getattr(each, field) for each in group) for group in (early, late))
        print(field, before, after)
        assert after <= 1.1 * before, field
