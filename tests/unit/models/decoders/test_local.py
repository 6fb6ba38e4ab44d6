from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from bim.models.decoders.local import LocalDecoder
from bim.models.masks.plan import MaskPlan, block_plans, partial_plan, random_permutation
from bim.models.seeding import forked_rng, generator
from bim.models.tokens import gather_tokens, sincos_positions

GRID = (3, 4)


def decoder(**changes: Any) -> LocalDecoder:
    sizes = {
        "in_dim": 24,
        "dim": 16,
        "depth": 1,
        "num_heads": 2,
        "out_dim": 5,
        "num_prefix_tokens": 1,
    }
    with forked_rng("decoder test"):
        return LocalDecoder(**(sizes | changes))


def plan_of(visible: int = 4, batch: int = 2) -> MaskPlan:
    return block_plans(random_permutation(batch, 12, generator(0)), GRID, [visible])[0]


def tokens(count: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, count, 24, generator=generator("tokens"))


def test_it_predicts_the_masked_units_and_decodes_the_others_beside_them() -> None:
    assert decoder()(tokens(5), plan_of()).shape == (2, 8, 5)
    assert decoder().decode(tokens(5), plan_of()).shape == (2, 13, 16)


def test_predictions_belong_to_units_whatever_the_order_of_the_tokens() -> None:
    plan, x, net = plan_of(), tokens(5), decoder()
    visible, masked = torch.tensor([2, 0, 3, 1]), torch.tensor([7, 6, 0, 1, 3, 2, 5, 4])
    order = torch.cat([plan.keep[:, visible], plan.decode[:, masked]], dim=1)
    shuffled = replace(plan, permutation=order, decode=order[:, 4:])
    x_shuffled = torch.cat([x[:, :1], x[:, 1:][:, visible]], dim=1)
    torch.testing.assert_close(net(x_shuffled, shuffled), net(x, plan)[:, masked])


def test_the_layers_see_tokens_at_the_positions_of_their_units() -> None:
    plan, x, net = plan_of(), tokens(5), decoder()
    full = torch.zeros(2, 12, 16)
    embedded = net.embed(net.norm(x))
    for sample in range(2):
        full[sample] = net.mask_token[0, 0]
        full[sample, plan.keep[sample]] = embedded[sample, 1:]
    row_major = torch.cat([embedded[:, :1], full + net.positions(GRID)[:12]], dim=1)
    expected = net.head(net.out_norm(net.layers(row_major)))[:, 1:]
    torch.testing.assert_close(net(x, plan), gather_tokens(expected, plan.masked))


def test_every_norm_has_maes_epsilon() -> None:
    assert {layer.eps for layer in decoder().modules() if isinstance(layer, nn.LayerNorm)} == {1e-6}


def test_positions_are_neither_trained_nor_saved() -> None:
    net = decoder()
    before = set(net.state_dict())
    net(tokens(5), plan_of())
    assert set(net.state_dict()) == before
    assert not net.positions(GRID).requires_grad
    assert net.positions(GRID) is net.positions(GRID)


def test_one_decoder_serves_every_grid() -> None:
    net = decoder()
    for grid in (GRID, (2, 6), (4, 5)):
        units = grid[0] * grid[1]
        plan = block_plans(random_permutation(2, units, generator(0)), grid, [4])[0]
        assert net(tokens(5), plan).shape == (2, units - 4, 5)
        assert torch.equal(net.positions(grid)[:units], sincos_positions(16, grid))
        assert not net.positions(grid)[units].any()


def test_positions_follow_the_parameters_to_another_precision() -> None:
    net = decoder(recovery="aggregate")
    plan = partial_plan(plan_of(), 0.5, "furthest", generator(0))
    net(tokens(5), plan)
    assert net.to(torch.bfloat16)(tokens(5).bfloat16(), plan).dtype == torch.bfloat16


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
        ({"recovery": "mean"}, "decoder.recovery is 'mean'; it must be one of none, aggregate"),
    ],
)
def test_sizes_that_cannot_be_built_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        decoder(**changes)


def partial(visible: int = 4, throw_ratio: float = 0.5, batch: int = 2) -> MaskPlan:
    return partial_plan(plan_of(visible, batch), throw_ratio, "furthest", generator("partial"))


def lengths_seen(net: LocalDecoder, x: torch.Tensor, plan: MaskPlan) -> list[int]:
    """How many tokens each of the decoder's layers is given."""
    seen: list[int] = []
    for layer in net.layers:
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    net(x, plan)
    return seen


@pytest.mark.parametrize("recovery", ["none", "aggregate"])
def test_positions_that_all_samples_share_change_nothing(recovery: str) -> None:
    order = random_permutation(3, 12, generator(0), per_batch=True)
    (plan,) = block_plans(order, GRID, [4], shared=True)
    plan = partial_plan(plan, 0.5, "furthest", generator("partial"))
    net, x = decoder(recovery=recovery), tokens(5, 3)
    assert torch.equal(net(x, plan), net(x, replace(plan, shared=False)))


@pytest.mark.parametrize("recovery", ["none", "aggregate"])
def test_the_layers_see_98_tokens_where_half_of_196_are_thrown(recovery: str) -> None:
    plan = block_plans(random_permutation(2, 196, generator(0)), (14, 14), [49])[0]
    half = partial_plan(plan, 0.5, "furthest", generator(0))
    for some, length in ((plan, 196), (half, 98)):
        assert lengths_seen(decoder(depth=3, recovery=recovery), tokens(50), some) == [1 + length] * 3


def test_recovery_predicts_all_masked_tokens_and_without_it_only_those_decoded() -> None:
    plan, x = partial(), tokens(5)
    assert (plan.decode.shape[1], plan.thrown.shape[1]) == (2, 6)
    assert decoder()(x, plan).shape == (2, 2, 5)
    assert decoder(recovery="aggregate")(x, plan).shape == (2, 8, 5)


def test_recovery_changes_neither_the_other_parameters_nor_what_is_decoded() -> None:
    plain, whole = decoder(), decoder(recovery="aggregate")
    saved = whole.state_dict()
    assert set(saved) - set(plain.state_dict()) == {"recovery.log_weight"}
    assert all(torch.equal(saved[key], value) for key, value in plain.state_dict().items())
    assert torch.equal(whole(tokens(5), partial())[:, :2], plain(tokens(5), partial()))


def test_with_nothing_thrown_recovery_equals_the_plain_decoder_exactly() -> None:
    plan, x = plan_of(), tokens(5)
    plain, whole = decoder(), decoder(recovery="aggregate")
    assert torch.equal(whole(x, plan), plain(x, plan))
    assert torch.equal(plain(x, partial_plan(plan, 0.0, "furthest", generator(0))), plain(x, plan))


@pytest.mark.parametrize("scale", [1, 2])
def test_a_thrown_token_is_predicted_from_the_mean_of_its_decoded_neighbors(
    scale: int, shake: Callable[[nn.Module], None]
) -> None:
    plan = block_plans(random_permutation(2, 12, generator(0)), GRID, [3], [scale])[0]
    plan = partial_plan(plan, 0.6, "furthest", generator(1))
    net, x = decoder(recovery="aggregate"), tokens(1 + 3 * scale**2)
    shake(net)
    predicted = net(x, plan)[:, plan.decode.shape[1] :]
    hidden = net.decode(x, plan)[:, 1:]
    weight = net.recovery.log_weight.exp()
    positions, columns = net.positions(plan.token_grid), plan.token_grid[1]
    for sample in range(2):
        places = torch.cat([plan.keep_tokens, plan.decode], dim=1)[sample].tolist()
        decoded = dict(zip(places, hidden[sample], strict=True))
        for index, token in enumerate(plan.thrown[sample].tolist()):
            row, column = divmod(token, columns)
            total, divisor = torch.zeros(16), torch.zeros(16)
            for other, feature in decoded.items():
                down, right = other // columns - row, other % columns - column
                if max(abs(down), abs(right)) == 1:
                    w = weight[:, 0, down + 1, right + 1]
                    total, divisor = total + w * feature, divisor + w
            mean = total / divisor if divisor.any() else net.mask_token[0, 0]
            expected = net.head(net.out_norm(mean + positions[token]))
            torch.testing.assert_close(predicted[sample, index], expected)


def test_a_token_without_decoded_neighbors_falls_back_to_the_mask_token() -> None:
    order = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7]])
    plan = block_plans(order, (1, 8), [1])[0]
    plan = replace(plan, decode=order[:, 1:2], thrown=order[:, 2:])
    net, x = decoder(recovery="aggregate"), tokens(2, batch=1)
    recovered = net.recover(net.decode(x, plan), plan)
    expected = net.mask_token[0] + net.positions((1, 8))[3:8]
    assert torch.equal(recovered[0, 1:], expected)
    recovered.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


def test_what_a_thrown_token_gets_does_not_depend_on_other_thrown_tokens() -> None:
    plan, x, net = partial(), tokens(5), decoder(recovery="aggregate")
    fewer = replace(plan, thrown=plan.thrown[:, :3])
    torch.testing.assert_close(net(x, fewer), net(x, plan)[:, :5])


def test_gradients_of_thrown_tokens_reach_the_aggregation_and_the_layers() -> None:
    plan, net = partial(batch=8), decoder(recovery="aggregate")
    net(tokens(5, batch=8), plan)[:, plan.decode.shape[1] :].square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_the_aggregation_is_computed_in_float32_under_autocast() -> None:
    plan, x, net = partial(), tokens(5), decoder(recovery="aggregate")
    hidden = net.decode(x, plan)
    plain = net.recover(hidden, plan)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(net.recover(hidden, plan), plain)
        mixed = net(x, plan)
    torch.testing.assert_close(mixed.float(), net(x, plan), rtol=0.1, atol=0.1)


def test_visible_tokens_stand_at_their_places_inside_their_units() -> None:
    plan = block_plans(random_permutation(2, 12, generator(0)), GRID, [3], [2])[0]
    net, x = decoder(), tokens(13)
    row_major = torch.zeros(2, 48, 16) + net.mask_token
    embedded = net.embed(net.norm(x))
    for sample in range(2):
        row_major[sample, plan.keep_tokens[sample]] = embedded[sample, 1:]
    whole = torch.cat([embedded[:, :1], row_major + net.positions((6, 8))[:48]], dim=1)
    expected = net.head(net.out_norm(net.layers(whole)))[:, 1:]
    torch.testing.assert_close(net(x, plan), gather_tokens(expected, plan.masked))
