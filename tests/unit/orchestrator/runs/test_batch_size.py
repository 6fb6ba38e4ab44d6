"""The largest micro-batch that fits: by arithmetic, and tried."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bim.orchestrator.config.cli import load_settings
from bim.orchestrator.data.source import open_source
from bim.orchestrator.data.splits import make_splits
from bim.orchestrator.distributed.placement import StageLayout
from bim.orchestrator.runs.batch_size import MEMORY_SHARE, gpu_bytes, largest_batch, tried_batch
from bim.orchestrator.runs.prepare import resolve_run
from bim.orchestrator.runs.step_probe import Probe
from bim.orchestrator.training.block_trainer import BlockTrainer
from bim.orchestrator.training.memory import BlockMemory

BLOCKS = [BlockMemory(100, 100, 200, 40), BlockMemory(100, 100, 200, 80)]
"""400 bytes each, and 10 and 20 bytes of activations per image of a batch of 4."""


def layout(stages: tuple[tuple[int, ...], ...], gpus: float = 0.0) -> StageLayout:
    return StageLayout(stages, gpus, cpus=1.0, loader_cpus=0.0, threads=1)


@pytest.mark.parametrize(
    ("stages", "gpus", "device_bytes", "batch"),
    [
        (((0,), (1,)), 1.0, 400 + 20 * 64, 64),
        (((0,), (1,)), 1.0, 400 + 20 * 63.9, 32),
        (((0,), (1,)), 0.5, 2 * (400 + 20 * 64), 64),
        (((0, 1),), 1.0, 800 + 20 * 64, 64),
        (((0,), (1,)), 0.0, 800 + 30 * 64, 64),
        (((0,), (1,)), 1.0, 410, 0),
        (((0,), (1,)), 1.0, 10**9, 256),
    ],
)
def test_the_tightest_stage_decides(
    stages: tuple[tuple[int, ...], ...], gpus: float, device_bytes: float, batch: int
) -> None:
    assert largest_batch(BLOCKS, 4, layout(stages, gpus), device_bytes / MEMORY_SHARE + 1e-6, 256) == batch


def test_a_batch_whose_step_finds_no_memory_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings(["--placement.backend", "in_process"])
    source = open_source("digits")
    splits = make_splits(source, 0, 0.1, 0.2)
    run, _, _ = resolve_run(settings, Path("unused"), (source, splits))
    tried = []
    train_step = BlockTrainer.train_step

    def full(self: BlockTrainer, x: torch.Tensor, *args: object, **more: object) -> object:
        if not tried or tried[-1] != len(x):
            tried.append(len(x))
        if len(x) > 10:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return train_step(self, x, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(BlockTrainer, "train_step", full)
    one = StageLayout(((0, 1, 2, 3),), 0.0, cpus=1.0, loader_cpus=0.0, threads=1)
    assert tried_batch(Probe.of(run, one, "fp32"), 32, (source, splits)) == 8
    assert tried == [32, 16, 8]


def test_the_memory_of_gpus_is_that_of_the_smallest() -> None:
    listed = ("NVIDIA H100 80GB HBM3, 81559 MiB", "NVIDIA A100-SXM4-40GB, 40960 MiB")
    assert gpu_bytes(listed) == 40960 * 2**20
    assert gpu_bytes(()) is None
