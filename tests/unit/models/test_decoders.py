from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from models.decoders import LocalDecoder
from models.masking import MaskPlan, block_plans, random_order
from models.seeding import forked_rng, generator
from models.tokens import gather_tokens

GRID = (3, 4)


def decoder(**changes: Any) -> LocalDecoder:
    sizes = {
        "in_dim": 24,
        "dim": 16,
        "depth": 1,
        "num_heads": 2,
        "grid": GRID,
        "out_dim": 5,
        "num_prefix_tokens": 1,
    }
    with forked_rng("decoder test"):
        return LocalDecoder(**(sizes | changes))


def plan_of(visible: int = 4, batch: int = 2) -> MaskPlan:
    return block_plans(random_order(batch, 12, generator(0)), GRID, [visible])[0]


def tokens(count: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, count, 24, generator=generator("tokens"))


def test_it_predicts_the_masked_units_and_decodes_the_others_beside_them() -> None:
    assert decoder()(tokens(5), plan_of()).shape == (2, 8, 5)
    assert decoder().decode(tokens(5), plan_of()).shape == (2, 13, 16)


def test_predictions_belong_to_units_whatever_the_order_of_the_tokens() -> None:
    plan, x, net = plan_of(), tokens(5), decoder()
    visible, masked = torch.tensor([2, 0, 3, 1]), torch.tensor([7, 6, 0, 1, 3, 2, 5, 4])
    order = torch.cat([plan.keep[:, visible], plan.decode[:, masked]], dim=1)
    shuffled = replace(plan, order=order, decode=order[:, 4:])
    x_shuffled = torch.cat([x[:, :1], x[:, 1:][:, visible]], dim=1)
    torch.testing.assert_close(net(x_shuffled, shuffled), net(x, plan)[:, masked])


def test_the_layers_see_tokens_at_the_positions_of_their_units() -> None:
    plan, x, net = plan_of(), tokens(5), decoder()
    full = torch.zeros(2, 12, 16)
    embedded = net.embed(net.norm(x))
    for sample in range(2):
        full[sample] = net.mask_token[0, 0]
        full[sample, plan.keep[sample]] = embedded[sample, 1:]
    row_major = torch.cat([embedded[:, :1], full + net.positions[:12]], dim=1)
    expected = net.head(net.out_norm(net.layers(row_major)))[:, 1:]
    torch.testing.assert_close(net(x, plan), gather_tokens(expected, plan.masked))


def test_every_norm_has_maes_epsilon() -> None:
    assert {layer.eps for layer in decoder().modules() if isinstance(layer, nn.LayerNorm)} == {1e-6}


def test_positions_are_neither_trained_nor_saved() -> None:
    assert "positions" not in decoder().state_dict()
    assert "positions" not in dict(decoder().named_parameters())


def test_heads_left_open_are_one_per_32_of_width() -> None:
    assert decoder(dim=128, num_heads=None).layers[0].attn.num_heads == 4
    assert decoder(dim=16, num_heads=None).layers[0].attn.num_heads == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dim": 18, "num_heads": 2}, "decoder.dim is 18"),
        ({"dim": 16, "num_heads": 3}, "not divisible by 3 heads"),
        ({"dim": 100, "num_heads": None}, "not divisible by 3 heads"),
        ({"num_heads": 0}, "heads"),
        ({"depth": 0}, "decoder.depth is 0"),
    ],
)
def test_sizes_that_cannot_be_built_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        decoder(**changes)
