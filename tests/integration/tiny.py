"""The tiny family of the integration tests: four blocks of one layer on the scanned digits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator.block_trainer import OptimSpec
from orchestrator.checkpoint import CheckpointStore, Manifest, load_block_state, load_block_weights
from orchestrator.data.spec import DataSpec
from orchestrator.failures import RestartPolicy
from orchestrator.placement import Layout, consecutive
from orchestrator.pretrain import EpochReport, PretrainResult, RunPlan, StopRequest, pretrain
from orchestrator.schedules import CosineSchedule
from orchestrator.stages import DecoderSpec, FamilySpec, InProcessStages, Stages

STEPS_PER_EPOCH = 10


def family(blocks: int = 4, **changes: Any) -> FamilySpec:
    args = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2}
    settings: dict[str, Any] = {
        "backbone": "vit_tiny_patch16_224",
        "model_args": args,
        "blocks": (4 // blocks,) * blocks,
        "mask_ratios": (0.5, 0.6, 0.7, 0.75)[:blocks],
        "decoders": (DecoderSpec(1, 32, 2),) * blocks,
        "seed": 3,
        "optim": OptimSpec(clip_grad=1.0),
    }
    return FamilySpec(**(settings | changes))


def data(**changes: Any) -> DataSpec:
    settings: dict[str, Any] = {
        "source": "digits",
        "batch_size": 16,
        "size": (16, 16),
        "flip": False,
        "seed": 3,
    }
    return DataSpec(**(settings | changes))


def layout(stages: int = 4, blocks: int = 4) -> Layout:
    return Layout(consecutive(blocks, stages), gpus=0.0, cpus=0.3, loader_cpus=0.2, threads=1)


def in_process(spec: FamilySpec | None = None, stages: int = 4) -> InProcessStages:
    spec = spec or family()
    return InProcessStages(spec, data().train_batches, consecutive(len(spec.blocks), stages), threads=1)


class Ear:
    """Keeps what is said; calls `at_step` with every logged step."""

    def __init__(self, at_step: Callable[[int], None] | None = None) -> None:
        self.said: list[str] = []
        self.at_step = at_step

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        if self.at_step is not None:
            self.at_step(step)

    def on_epoch(self, report: EpochReport) -> None: ...

    def on_rewind(self, step: int) -> None: ...

    def say(self, text: str) -> None:
        self.said.append(text)


def train(
    stages: Stages,
    out: Path,
    steps: int = 50,
    every: int = 20,
    ear: Ear | None = None,
    stop: StopRequest | None = None,
    max_restarts: int = 0,
    micros: int = 1,
    keep: int = 2,
) -> PretrainResult:
    """Train to `steps` in epochs of ten steps, checkpoints every `every` steps."""
    ear = ear or Ear()
    plan = RunPlan(
        epochs=steps // STEPS_PER_EPOCH,
        steps_per_epoch=STEPS_PER_EPOCH,
        micros=micros,
        images_per_step=16 * micros,
        lr=CosineSchedule(1e-3, 5, steps),
        window=2 * len(stages.places),
        checkpoint_every=every,
        max_bad_images=0,
    )
    out.mkdir(parents=True, exist_ok=True)
    store = CheckpointStore(out, keep=keep, say=ear.say)
    store.clear_uncommitted()
    return pretrain(
        plan, stages, store, lambda step: Manifest(step, STEPS_PER_EPOCH, {}, {}, ()), ear, RestartPolicy(max_restarts),
        stop or StopRequest(),
    )  # fmt: skip


def state(out: Path, step: int, blocks: int = 4) -> dict[str, Tensor]:
    """Weights and optimizer state of a committed checkpoint, all blocks, flat."""
    directory = CheckpointStore(out).directory(step)
    found: dict[str, Tensor] = {}
    for k in range(blocks):
        found |= {f"{k}/{name}": value for name, value in load_block_weights(directory, k).items()}
        found |= {f"{k}/optimizer/{name}": value for name, value in load_block_state(directory, k).items()}
    return found


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not bit for bit the same."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]
