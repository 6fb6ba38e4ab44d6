"""The memory that is computed against tensors that are counted."""

from __future__ import annotations

import pytest

from bim.orchestrator.benchmarks.activation_memory import saved_in_step
from bim.orchestrator.training.block_trainer import BlockTrainer
from bim.orchestrator.training.build import build_local_mim, open_spec_backbone
from bim.orchestrator.training.memory import block_memories
from bim.orchestrator.training.spec import DecoderSpec, OptimSpec, Precision, PretrainSpec

BACKBONES = {
    "vit_tiny_patch16_224": {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 2},
    "swin_tiny_patch4_window7_224": {
        "img_size": 64,
        "window_size": 4,
        "embed_dim": 24,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 2, 2, 4],
    },
    "resnet50": {"img_size": 64, "layers": [1, 1, 1, 1], "channels": [16, 16, 32, 32]},
}


def spec(name: str) -> PretrainSpec:
    blocks = (1, 1, 1, 1)
    return PretrainSpec(name, BACKBONES[name], blocks, (0.75,) * 4, (DecoderSpec(1, 32),) * 4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", BACKBONES)
def test_activations_are_those_that_autograd_saves(name: str, precision: Precision) -> None:
    backbone = open_spec_backbone(spec(name))
    computed = [m.activations for m in block_memories(spec(name), backbone, (64, 64), 32, precision)]
    assert computed == pytest.approx(saved_in_step(spec(name), 32, precision=precision), rel=0.1)


@pytest.mark.parametrize("name", BACKBONES)
def test_weights_gradients_and_moments_are_those_of_a_trainer_after_a_step(name: str) -> None:
    import torch

    backbone = open_spec_backbone(spec(name))
    for k, memory in enumerate(block_memories(spec(name), backbone, (64, 64), 2, "fp32")):
        module = build_local_mim(spec(name), k, backbone)
        trainer = BlockTrainer(module, k, OptimSpec(), torch.device("cpu"))
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        trainer._optimizer.step()
        moments = [v for state in trainer._optimizer.state.values() for v in state.values() if v.ndim]
        assert memory.parameters == sum(4 * p.numel() for p in module.parameters())
        assert memory.gradients == sum(4 * p.numel() for p in module.parameters() if p.grad is not None)
        assert memory.optimizer == pytest.approx(sum(4 * v.numel() for v in moments), rel=0.01)
