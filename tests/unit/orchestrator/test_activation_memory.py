from __future__ import annotations

import torch
from torch import nn

from orchestrator.activation_memory import counting_saved, saved_activations
from orchestrator.family_spec import DecoderSpec, FamilySpec


def test_each_storage_is_counted_once_and_parameters_are_not() -> None:
    layer = nn.Linear(8, 8)
    x = torch.randn(4, 8, requires_grad=True)
    with counting_saved(iter(layer.parameters())) as saved:
        y = layer(x)
        (y * y).sum()
    assert saved.total == x.untyped_storage().nbytes() + y.untyped_storage().nbytes()


def test_blocks_hold_less_than_the_end_to_end_model_and_scale_with_the_batch() -> None:
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}

    def saved(blocks: int, batch: int) -> list[int]:
        spec = FamilySpec(
            "vit_tiny_patch16_224",
            args,
            (4 // blocks,) * blocks,
            (0.75,) * blocks,
            (DecoderSpec(1, 32, 1),) * blocks,
        )
        return saved_activations(spec, batch)

    (whole,), parts = saved(1, 8), saved(4, 8)
    assert max(parts) < whole < sum(parts)
    assert 1.9 < max(saved(4, 16)) / max(parts) < 2.1
