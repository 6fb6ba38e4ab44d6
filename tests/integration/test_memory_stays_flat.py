"""Nothing piles up: private memory of the driver, the loader and every stage late in a run, against early in it."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from bim.orchestrator.distributed.ray_stage_group import RayStages
from bim.orchestrator.training.spec import DecoderSpec
from tests.integration.tiny import AtStep, data, layout, tiny_spec, train

EARLY, LATE = 500, 2000


def private_bytes(pid: int) -> int:
    """USS: what would be freed if the process ended; shared memory of the object store does not count."""
    return int(psutil.Process(pid).memory_full_info().uss)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_private_memory_at_step_2000_is_within_5_percent_of_step_500(tmp_path: Path) -> None:
    small = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 1}
    spec = tiny_spec(model_args=small, mask_ratios=(0.5,) * 4, decoders=(DecoderSpec(1, 16, 1),) * 4)
    stages = RayStages(spec, data(), layout(), shared=tmp_path)
    measured: dict[int, list[int]] = {}

    def at_step(step: int) -> None:
        if step in (EARLY, LATE):
            pids = [psutil.Process().pid, *stages.pids()]
            measured[step] = [private_bytes(pid) for pid in pids]

    try:
        train(stages, tmp_path, steps=LATE, every=250, callback=AtStep(at_step))
    finally:
        stages.close()
    names = ["driver", "loader", *(f"stage {i}" for i in range(len(stages.stage_blocks)))]
    growth = {n: late / early for n, early, late in zip(names, measured[EARLY], measured[LATE], strict=True)}
    print({name: f"{value:.3f}" for name, value in growth.items()})
    assert all(value < 1.05 for value in growth.values()), growth
