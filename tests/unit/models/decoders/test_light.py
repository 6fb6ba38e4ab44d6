from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bim.models.decoders.light import LightDecoder
from bim.models.masks.plan import MaskPlan, block_plans, random_permutation
from bim.models.seeding import forked_rng, generator
from bim.models.tokens import gather_tokens


def decoder(**changes: int) -> LightDecoder:
    sizes = {"in_dim": 24, "dim": 16, "depth": 2, "num_heads": 2, "out_dim": 10, "num_prefix_tokens": 1}
    with forked_rng("light"):
        return LightDecoder(**(sizes | changes))


@pytest.fixture
def plan() -> MaskPlan:
    return block_plans(random_permutation(3, 12, generator("order")), (3, 4), [3])[0]


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randn(3, 1 + 12, 24, generator=generator("tokens"))


def test_it_predicts_each_masked_unit_from_the_token_in_its_own_place(
    plan: MaskPlan, tokens: torch.Tensor
) -> None:
    light = decoder()
    everything = light.head(light.out_norm(light.layers(light.embed(light.norm(tokens)))))[:, 1:]
    predicted = light(tokens, plan)
    assert predicted.shape == (3, 9, 10)
    torch.testing.assert_close(predicted, gather_tokens(everything, plan.masked), rtol=0, atol=1e-6)


def test_every_token_may_speak_and_prefix_tokens_are_never_scored(
    plan: MaskPlan, tokens: torch.Tensor
) -> None:
    light, tokens = decoder(), tokens.requires_grad_()
    light(tokens, plan).square().sum().backward()
    assert tokens.grad is not None
    assert (tokens.grad.abs().sum(dim=-1) > 0).all()


def test_a_decoder_serves_every_grid(tokens: torch.Tensor) -> None:
    light = decoder()
    plan = block_plans(random_permutation(3, 30, generator("order")), (5, 6), [7])[0]
    assert light(torch.randn(3, 31, 24), plan).shape == (3, 23, 10)
    assert {name.partition(".")[0] for name in light.state_dict()} == {
        "norm",
        "embed",
        "layers",
        "out_norm",
        "head",
    }


def test_a_finer_token_grid_scores_all_tokens_of_masked_units() -> None:
    order = random_permutation(2, 4, generator("units"))
    (plan,) = block_plans(order, (2, 2), [1], scales=[2])
    light = decoder(num_prefix_tokens=0)
    tokens = torch.randn(2, 16, 24, generator=generator("tokens"))
    assert light(tokens, plan).shape == (2, 12, 10)


def test_tokens_of_visible_units_alone_are_refused(plan: MaskPlan, tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="are not the 3 x 4 tokens"):
        decoder()(tokens[:, :4], plan)
    with pytest.raises(ValueError, match="needs an encoder of all tokens"):
        decoder()(tokens, replace(plan, grid=(4, 4)))


def test_sizes_that_do_not_fit_are_refused_by_setting() -> None:
    with pytest.raises(ValueError, match=r"decoder\.depth is 0"):
        decoder(depth=0)
    with pytest.raises(ValueError, match=r"decoder\.num_heads"):
        decoder(num_heads=3)


def test_heads_are_32_wide_by_default() -> None:
    light = LightDecoder(24, dim=128, depth=1, num_heads=None, out_dim=4, num_prefix_tokens=0)
    assert light.layers[0].attn.num_heads == 4
