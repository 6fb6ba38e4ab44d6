"""The tiny model of the integration tests: four blocks of one layer on the scanned digits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bim.orchestrator.data.phases import Phase, PhaseSpec, constant, phase_at
from bim.orchestrator.data.spec import DataSpec
from bim.orchestrator.distributed.placement import StageLayout, consecutive
from bim.orchestrator.training.callbacks import Callback, NullCallback, PretrainResult, StopRequest
from bim.orchestrator.training.checkpoint import CheckpointStore, load_block_state, load_block_weights
from bim.orchestrator.training.loop import pretrain
from bim.orchestrator.training.lr_schedule import CosineSchedule
from bim.orchestrator.training.manifest import Manifest
from bim.orchestrator.training.restart_policy import RestartPolicy
from bim.orchestrator.training.schedule import TrainingSchedule
from bim.orchestrator.training.spec import DecoderSpec, OptimSpec, PretrainSpec, TargetSpec
from bim.orchestrator.training.stage_group import InProcessStages, Stages
from bim.orchestrator.training.storage import Checkpoints, Location
from bim.orchestrator.training.watchdog import Watchdog

STEPS_PER_EPOCH = 10


def tiny_spec(blocks: int = 4, **changes: Any) -> PretrainSpec:
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
    return PretrainSpec(**(settings | changes))


def data(**changes: Any) -> DataSpec:
    settings: dict[str, Any] = {
        "source": "digits",
        "phases": (PhaseSpec(0, (16, 16), 16),),
        "flip": False,
        "seed": 3,
    }
    return DataSpec(**(settings | changes))


def growing() -> tuple[PretrainSpec, DataSpec, tuple[Phase, ...]]:
    """Every feature at once: three image sizes, one with accumulated gradients, thrown tokens, boundary noise."""
    throw = DecoderSpec(1, 32, 2, throw_ratio=0.25, recovery="aggregate")
    spec = tiny_spec(decoders=(throw,) * 4, boundary_noise=0.25)
    phases = (PhaseSpec(0, (16, 16), 256), PhaseSpec(1, (24, 24), 128, 2), PhaseSpec(3, (32, 32), 128))
    images = data(phases=phases)
    return spec, images, replace(images, workers=0).train_batches().phases


def hierarchy() -> tuple[PretrainSpec, DataSpec, tuple[Phase, ...]]:
    """Twins on visible tokens; images that grow after the first epoch, HOG cells per level, tokens thrown on fine grids."""
    args = {"img_size": 96, "embed_dims": [8, 16, 24, 32], "depths": [2, 2, 2, 2], "num_heads": [1, 1, 2, 2]}
    spec = replace(
        tiny_spec(),
        backbone="twins_svt_small",
        model_args={**args, "wss": [4, 4, 2, 2]},
        blocks=(2, 2, 2, 2),
        mask_ratios=(0.5,) * 4,
        decoders=tuple(
            DecoderSpec(1, 32, 2, throw_ratio=ratio, recovery="aggregate") for ratio in (0.4, 0.3, 0.0, 0.0)
        ),
        targets=tuple(TargetSpec("hog", {"cell": cell}) for cell in (4, 8, 16, 32)),
    )
    images = data(phases=(PhaseSpec(0, (64, 64), 32), PhaseSpec(1, (96, 96), 32)), test_fraction=0.82)
    return spec, images, replace(images, workers=0).train_batches().phases


def shifted() -> tuple[PretrainSpec, DataSpec]:
    """Swin on visible tokens with shifted windows; targets and thrown tokens as in `hierarchy`."""
    twins, _, _ = hierarchy()
    args = {
        "img_size": 96,
        "embed_dim": 8,
        "depths": [2, 2, 2, 2],
        "num_heads": [1, 1, 2, 2],
        "window_size": 3,
    }
    spec = replace(twins, backbone="swin_tiny_patch4_window7_224", model_args=args)
    return spec, data(phases=(PhaseSpec(0, (96, 96), 16),), test_fraction=0.82)


def layout(stages: int = 4, blocks: int = 4) -> StageLayout:
    return StageLayout(consecutive(blocks, stages), gpus=0.0, cpus=0.3, loader_cpus=0.2, threads=1)


def in_process(spec: PretrainSpec | None = None, stages: int = 4) -> InProcessStages:
    spec = spec or tiny_spec()
    return InProcessStages(spec, data().train_batches, consecutive(len(spec.blocks), stages), threads=1)


class AtStep(NullCallback):
    """Calls a function with every logged step."""

    def __init__(self, function: Callable[[int], None]) -> None:
        self._function = function

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        self._function(step)


def train(
    stages: Stages,
    out: Path,
    steps: int = 50,
    every: int = 20,
    callback: Callback | None = None,
    stop: StopRequest | None = None,
    max_restarts: int = 0,
    grad_accum_steps: int = 1,
    keep: int = 2,
    phases: tuple[Phase, ...] = (),
    watchdog: Watchdog | None = None,
    store: Checkpoints | None = None,
) -> PretrainResult:
    """Train to `steps` in epochs of ten steps, checkpoints every `every` steps in `store`; None: in `out`."""
    epochs = (
        steps // STEPS_PER_EPOCH if not phases else phase_at(phases, steps - 1).epoch_of(steps - 1)[0] + 1
    )
    phases = phases or constant(STEPS_PER_EPOCH, 16, grad_accum_steps, (16, 16))
    schedule = TrainingSchedule(
        epochs=epochs,
        phases=phases,
        lr=CosineSchedule(1.6e-2 / grad_accum_steps, 0.5, epochs, phases),
        window=2 * len(stages.stage_blocks),
        checkpoint_epochs=every / STEPS_PER_EPOCH,
        max_bad_images=0,
    )
    out.mkdir(parents=True, exist_ok=True)
    store = store or CheckpointStore(out, keep=keep)
    store.clear_uncommitted()
    return pretrain(
        schedule,
        stages,
        store,
        lambda step: Manifest(step, STEPS_PER_EPOCH, {}, {}, ()),
        callback or NullCallback(),
        RestartPolicy(max_restarts),
        stop or StopRequest(),
        watchdog,
    )


def state(out: Path, step: int, blocks: int = 4) -> dict[str, Tensor]:
    """Weights and optimizer state of a committed checkpoint, all blocks, flat."""
    return tensors_of(CheckpointStore(out).directory(step), blocks)


def tensors_of(directory: Location, blocks: int = 4) -> dict[str, Tensor]:
    """As `state`, of a checkpoint folder."""
    tensors: dict[str, Tensor] = {}
    for k in range(blocks):
        tensors |= {f"{k}/{name}": value for name, value in load_block_weights(directory, k).items()}
        tensors |= {f"{k}/optimizer/{name}": value for name, value in load_block_state(directory, k).items()}
    return tensors


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not bit for bit the same."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]
