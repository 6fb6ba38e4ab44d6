from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from models.backbones import ViTBackbone
from models.decoders import LocalDecoder
from models.local_mim import LocalMIM, LocalStep
from models.masking import MaskPlan, block_plans, random_order
from models.seeding import forked_rng, generator
from models.targets import PixelTarget
from models.tokens import patchify

VISIBLE = (9, 6, 4)
IMAGES = torch.randn(3, 3, 32, 32, generator=generator("images"))
PLANS = block_plans(random_order(3, 16, generator("order")), (4, 4), VISIBLE)


@pytest.fixture
def family(tiny_backbone: Callable[..., ViTBackbone]) -> list[LocalMIM]:
    return build(tiny_backbone(3))


def build(backbone: ViTBackbone, **changes: Any) -> list[LocalMIM]:
    blocks = []
    for info in backbone.blocks:
        with forked_rng("decoder", info.index):
            decoder = LocalDecoder(info.width, 16, 1, None, info.grid, 192, info.num_prefix_tokens)
        blocks.append(LocalMIM(backbone.build_block(info.index, seed=0), decoder, PixelTarget(8), **changes))
    return blocks


def run(family: list[LocalMIM], plans: tuple[MaskPlan, ...] = PLANS) -> list[LocalStep]:
    steps: list[LocalStep] = []
    for block, plan in zip(family, plans, strict=True):
        steps.append(block(steps[-1].activations if steps else IMAGES, IMAGES, plan))
    return steps


def gradients(family: list[LocalMIM]) -> list[torch.Tensor | None]:
    return [parameter.grad for block in family for parameter in block.parameters()]


@pytest.mark.parametrize("scored", range(3))
def test_a_loss_gives_exactly_no_gradient_to_another_block(family: list[LocalMIM], scored: int) -> None:
    run(family)[scored].loss.backward()
    for index, block in enumerate(family):
        given = [parameter.grad is not None for parameter in block.parameters()]
        assert all(given) if index == scored else not any(given)


def test_no_gradient_crosses_a_boundary_even_where_the_input_asks_for_one(family: list[LocalMIM]) -> None:
    x = torch.randn(3, 10, 24, requires_grad=True)
    family[1](x, IMAGES, PLANS[1]).loss.backward()
    assert x.grad is None


def test_backward_per_block_equals_backward_of_the_summed_loss(family: list[LocalMIM]) -> None:
    twin = copy.deepcopy(family)
    steps: list[LocalStep] = []
    for block, plan in zip(family, PLANS, strict=True):
        steps.append(block(steps[-1].activations if steps else IMAGES, IMAGES, plan))
        steps[-1].loss.backward()
    torch.stack([step.loss for step in run(twin)]).sum().backward()
    for one, other in zip(gradients(family), gradients(twin), strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


def test_activations_are_the_detached_residual_stream_of_the_visible_tokens(family: list[LocalMIM]) -> None:
    first, second, _ = run(family)
    assert [step.activations.shape for step in (first, second)] == [(3, 10, 24), (3, 7, 24)]
    assert not first.activations.requires_grad
    expected = family[1].encoder.layers(first.activations[:, : 1 + VISIBLE[1]])
    assert torch.equal(second.activations, expected)
    assert family[0].decoder.norm(first.activations).std() - first.activations.std() != 0


def test_the_loss_is_the_papers_mean_over_masked_patches(family: list[LocalMIM]) -> None:
    step, plan = run(family)[0], PLANS[0]
    patches = patchify(IMAGES, 8)
    wanted = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6) ** 0.5
    predicted = torch.zeros_like(wanted)
    is_masked = torch.zeros(3, 16)
    for sample in range(3):
        predicted[sample, plan.masked[sample]] = family[0].decoder(step.activations, plan)[sample]
        is_masked[sample, plan.masked[sample]] = 1
    errors = ((predicted - wanted) ** 2).mean(-1)
    torch.testing.assert_close(step.loss, (errors * is_masked).sum() / is_masked.sum())


def test_always_masked_and_newly_dropped_parts_average_back_to_the_loss(family: list[LocalMIM]) -> None:
    first, *later = run(family)
    assert set(first.parts) == {"loss_always_masked"}
    assert torch.equal(first.parts["loss_always_masked"], first.loss.detach())
    for step, visible in zip(later, VISIBLE[1:], strict=True):
        always, newly = 16 - VISIBLE[0], VISIBLE[0] - visible
        total = always * step.parts["loss_always_masked"] + newly * step.parts["loss_newly_dropped"]
        torch.testing.assert_close(total / (always + newly), step.loss.detach())
        assert not any(part.requires_grad for part in step.parts.values())


def test_newly_dropped_units_can_be_left_out_of_the_loss(tiny_backbone: Callable[..., ViTBackbone]) -> None:
    all_scored, always_only = (
        run(build(tiny_backbone(3))),
        run(build(tiny_backbone(3), score_newly_dropped=False)),
    )
    for one, other in zip(all_scored[1:], always_only[1:], strict=True):
        assert one.parts == other.parts
        assert torch.equal(other.loss.detach(), other.parts["loss_always_masked"])
        assert not torch.equal(other.loss, one.loss)


def test_the_loss_is_in_float32_under_autocast(family: list[LocalMIM]) -> None:
    plain = run(family)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = run(family)[0]
    assert mixed.loss.dtype == torch.float32
    torch.testing.assert_close(mixed.loss, plain.loss, rtol=0.05, atol=0.05)


def test_a_step_leaves_torchs_generator_alone(family: list[LocalMIM]) -> None:
    before = torch.get_rng_state()
    run(family)[0].loss.backward()
    assert torch.equal(before, torch.get_rng_state())
