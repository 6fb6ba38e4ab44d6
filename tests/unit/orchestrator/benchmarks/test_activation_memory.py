from __future__ import annotations

import pytest
import torch
from torch import nn

from bim.orchestrator.benchmarks.activation_memory import counting_saved, saved_activations, saved_in_step
from bim.orchestrator.training.build import build_local_mim
from bim.orchestrator.training.spec import DecoderSpec, Precision, PretrainSpec


def tiny(blocks: int) -> PretrainSpec:
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
    return PretrainSpec(
        "vit_tiny_patch16_224",
        args,
        (4 // blocks,) * blocks,
        (0.75,) * blocks,
        (DecoderSpec(1, 32, 1),) * blocks,
    )


def test_each_storage_is_counted_once_and_parameters_are_not() -> None:
    layer = nn.Linear(8, 8)
    x = torch.randn(4, 8, requires_grad=True)
    with counting_saved(iter(layer.parameters())) as saved:
        y = layer(x)
        (y * y).sum()
    assert saved.total == x.untyped_storage().nbytes() + y.untyped_storage().nbytes()


def test_blocks_hold_less_than_the_end_to_end_model_and_scale_with_the_batch() -> None:
    (whole,), parts = saved_activations(tiny(1), 8), saved_activations(tiny(4), 8)
    assert max(parts) < whole < sum(parts)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_told_is_proportional_to_the_batch_in_every_precision(precision: Precision) -> None:
    told = {batch: saved_activations(tiny(2), batch, precision=precision) for batch in (1, 8, 48)}
    assert told[8] == [8 * one for one in told[1]]
    assert told[48] == [48 * one for one in told[1]]
    counted = {batch: saved_in_step(tiny(2), batch, precision=precision) for batch in (8, 16)}
    assert told[8] == [more - few for few, more in zip(counted[8], counted[16], strict=True)]


def test_in_float32_all_that_is_saved_grows_with_the_batch_but_a_few_numbers() -> None:
    for told, counted in zip(saved_activations(tiny(2), 8), saved_in_step(tiny(2), 8), strict=True):
        assert 0 <= counted - told < 1e-3 * told


def test_copies_of_weights_in_bfloat16_are_not_told_of_as_activations() -> None:
    (told,) = saved_activations(tiny(1), 8, precision="bf16")
    (counted,) = saved_in_step(tiny(1), 8, precision="bf16")
    module = build_local_mim(tiny(1), 0)
    matrices = sum(2 * layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))
    assert counted - told > 0.9 * matrices
