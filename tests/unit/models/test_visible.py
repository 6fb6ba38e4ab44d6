from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import PatchEmbed
from timm.models.swin_transformer import PatchMerging, WindowAttention
from timm.models.twins import GlobalSubSampleAttn, LocallyGroupedAttn
from torch import Tensor, nn

from bim.models.masks.level_indices import LevelIndices, LevelRequirements, level_indices
from bim.models.masks.plan import MaskPlan, block_plans, random_permutation, unit_tokens
from bim.models.seeding import forked_rng, generator
from bim.models.tokens import gather_tokens
from bim.models.visible import (
    merge_patches,
    merge_tokens,
    patch_linear,
    position_convolution,
    spatial_reduction_attention,
    visible_patches,
    window_attention,
)

Pair = tuple[int, int]
BATCH, WIDTH, HEADS = 2, 8, 2


@st.composite
def masks(draw: st.DrawFn, scales: tuple[int, ...] = (1, 2, 3)) -> MaskPlan:
    """Plans of 2 samples over up to 4 x 4 units, one mask for both or one for each, up to all but one unit visible."""
    grid = draw(st.tuples(st.integers(1, 4), st.integers(2, 4)))
    units = grid[0] * grid[1]
    gen = generator(draw(st.integers(0, 10**6)))
    shared = draw(st.booleans())
    order = random_permutation(BATCH, units, gen, per_batch=shared)
    visible, scale = draw(st.integers(1, units - 1)), draw(st.sampled_from(scales))
    return block_plans(order, grid, [visible], [scale], shared)[0]


def tokens_of(plan: MaskPlan, *more: int) -> tuple[Tensor, Tensor]:
    """Random values of all tokens (B, N, C), and those of the visible ones in the plan's order."""
    count = plan.token_grid[0] * plan.token_grid[1]
    x = torch.randn(BATCH, count, WIDTH, generator=generator("x", count, *more)).requires_grad_()
    return x, gather_tokens(x, plan.keep_tokens)


def answer(plan: MaskPlan, required: LevelRequirements) -> LevelIndices:
    keep = plan.keep[:1] if (plan.keep == plan.keep[:1]).all() else plan.keep
    return level_indices(keep, plan.grid, required)


def is_visible(plan: MaskPlan) -> Tensor:
    """(B, N) bool over the tokens."""
    visible = torch.zeros(BATCH, plan.token_grid[0] * plan.token_grid[1], dtype=torch.bool)
    return visible.scatter(1, plan.keep_tokens, True)


def window_numbers(side: int, window: int, shift: int) -> Tensor:
    """Window of each place along an axis, written out; an axis that fits into a window is one."""
    if side <= window:
        return torch.zeros(side, dtype=torch.int64)
    return torch.tensor([0 if place < shift else 1 + (place - shift) // window for place in range(side)])


def dense_window_attention(attention: WindowAttention, x: Tensor, plan: MaskPlan, shift: Pair) -> Tensor:
    """Attention of all tokens (B, N, C) on the whole grid, keys of masked tokens and of other windows left out."""
    height, width = plan.token_grid
    nominal: Pair = attention.window_size
    down, across = (
        window_numbers(side, window, moved)
        for side, window, moved in zip(plan.token_grid, nominal, shift, strict=True)
    )
    numbers = (down[:, None] * 1000 + across).flatten()
    row, column = torch.arange(height * width) // width, torch.arange(height * width) % width
    together = numbers[:, None] == numbers
    rows = (row[:, None] - row + nominal[0] - 1).where(together, 0)
    columns = (column[:, None] - column + nominal[1] - 1).where(together, 0)
    bias = attention.relative_position_bias_table[rows * (2 * nominal[1] - 1) + columns].permute(2, 0, 1)
    q, k, v = attention.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-1, -2) * attention.scale + bias
    seen = together & is_visible(plan)[:, None, None, :]
    scores = scores.masked_fill(~seen, -1e9)  # rows of masked queries may see nothing; they are not compared
    out: Tensor = attention.proj((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))
    return out


@given(masks(), st.tuples(st.integers(2, 5), st.integers(2, 5)), st.booleans())
@settings(max_examples=60, deadline=None)
def test_grouped_attention_is_dense_window_attention_with_masked_keys_and_so_are_its_gradients(
    plan: MaskPlan, window: Pair, shifted: bool
) -> None:
    shift = (window[0] // 2, window[1] // 2) if shifted else (0, 0)
    with forked_rng("attention"):
        attention = WindowAttention(WIDTH, HEADS, window_size=window)
    table = attention.relative_position_bias_table
    required = LevelRequirements(0, plan.scale, WIDTH, window, (shift,))
    x, visible = tokens_of(plan)
    ours = window_attention(attention, visible, answer(plan, required).groups[shift], table)
    dense = gather_tokens(dense_window_attention(attention, x, plan, shift), plan.keep_tokens)
    torch.testing.assert_close(ours, dense, rtol=1e-4, atol=1e-5)
    weights = torch.randn(ours.shape, generator=generator("cotangent"))
    inputs = (x, table, attention.qkv.weight)
    for got, wanted in zip(
        torch.autograd.grad((ours * weights).sum(), inputs, retain_graph=True),
        torch.autograd.grad((dense * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@given(masks(scales=(2, 3, 4)), st.booleans())
@settings(max_examples=30, deadline=None)
def test_what_lies_in_slots_left_over_changes_no_bit(plan: MaskPlan, has_table: bool) -> None:
    with forked_rng("attention"):
        attention = WindowAttention(WIDTH, HEADS, window_size=3)
    groups = answer(plan, LevelRequirements(0, plan.scale, WIDTH, (3, 3), ((1, 1),))).groups[1, 1]
    table = attention.relative_position_bias_table if has_table else None
    _, visible = tokens_of(plan)
    garbage = torch.randint(visible.shape[1], groups.token_of_slot.shape, generator=generator("garbage"))
    tokens = torch.arange(visible.shape[1]).expand_as(groups.slot_of_token)
    others = replace(groups, token_of_slot=garbage.scatter(1, groups.slot_of_token, tokens))
    results = []
    for some in (groups, others):
        out = window_attention(attention, visible, some, table)
        (gradient,) = torch.autograd.grad(out.square().sum(), attention.qkv.weight)
        results.append((out, gradient))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-5)


@given(masks(), st.integers(2, 4))
@settings(max_examples=30, deadline=None)
def test_windows_without_a_table_are_seen_alike(plan: MaskPlan, window: int) -> None:
    with forked_rng("attention"):
        attention = WindowAttention(WIDTH, HEADS, window_size=window)
        plain = LocallyGroupedAttn(WIDTH, HEADS, ws=window)
    nn.init.zeros_(attention.relative_position_bias_table)
    plain.load_state_dict({key: attention.state_dict()[key] for key in plain.state_dict()})
    groups = answer(plan, LevelRequirements(0, plan.scale, WIDTH, (window, window), ((0, 0),))).groups[0, 0]
    x, visible = tokens_of(plan)
    dense = dense_window_attention(attention, x, plan, (0, 0))
    expected = gather_tokens(dense, plan.keep_tokens)
    torch.testing.assert_close(window_attention(plain, visible, groups), expected, rtol=1e-4, atol=1e-5)


@given(masks(scales=(1, 2, 4)))
@settings(max_examples=40, deadline=None)
def test_a_position_convolution_sees_zeros_for_masked_tokens_and_beyond_the_border(plan: MaskPlan) -> None:
    with forked_rng("conv"):
        conv = nn.Conv2d(WIDTH, WIDTH, 3, 1, 1, groups=WIDTH)
    x, visible = tokens_of(plan)
    halo = answer(plan, LevelRequirements(0, plan.scale, WIDTH, halo=True)).halo
    assert halo is not None
    filled = (x * is_visible(plan).unsqueeze(-1)).transpose(1, 2).unflatten(2, plan.token_grid)
    expected = gather_tokens(conv(filled).flatten(2).transpose(1, 2), plan.keep_tokens)
    ours = position_convolution(conv, visible, halo, plan.scale)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@given(masks(scales=(2, 4)), st.sampled_from([1, 2]))
@settings(max_examples=30, deadline=None)
def test_keys_are_made_of_visible_cells_alone(plan: MaskPlan, ratio: int) -> None:
    with forked_rng("attention"):
        attention = GlobalSubSampleAttn(WIDTH, HEADS, sr_ratio=ratio)
    x, visible = tokens_of(plan)
    keys = x
    if attention.sr is not None:
        reduced = attention.sr(x.transpose(1, 2).unflatten(2, plan.token_grid)).flatten(2).transpose(1, 2)
        keys = attention.norm(reduced)
    keys = gather_tokens(keys, unit_tokens(plan.keep, plan.grid, plan.scale // ratio))
    q = attention.q(visible).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    k, v = attention.kv(keys).unflatten(-1, (2, HEADS, -1)).permute(2, 0, 3, 1, 4)
    seen = (q @ k.transpose(-1, -2) * attention.scale).softmax(dim=-1) @ v
    expected = attention.proj(seen.transpose(1, 2).flatten(2))
    ours = spatial_reduction_attention(attention, visible, plan.scale)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@given(masks(scales=(2, 4)))
@settings(max_examples=30, deadline=None)
def test_merging_is_timms_on_the_cells_of_visible_units(plan: MaskPlan) -> None:
    with forked_rng("merging"):
        merging, conv = PatchMerging(WIDTH), nn.Conv2d(WIDTH, 5, 2, 2)
    x, visible = tokens_of(plan)
    where = unit_tokens(plan.keep, plan.grid, plan.scale // 2)
    maps = x.unflatten(1, plan.token_grid)
    expected = gather_tokens(merging(maps).flatten(1, 2), where)
    torch.testing.assert_close(merge_patches(merging, visible, plan.scale), expected, rtol=1e-5, atol=1e-5)
    expected = gather_tokens(conv(maps.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2), where)
    ours = patch_linear(conv, merge_tokens(visible, plan.scale, 2))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@given(masks(scales=(2,)))
@settings(max_examples=20, deadline=None)
def test_patches_of_visible_units_are_those_that_timm_embeds(plan: MaskPlan) -> None:
    size = (plan.grid[0] * 8, plan.grid[1] * 8)
    with forked_rng("embed"):
        embed = PatchEmbed(img_size=size, patch_size=4, embed_dim=WIDTH)
    images = torch.randn(BATCH, 3, *size, generator=generator("images"))
    expected = gather_tokens(embed(images), plan.keep_tokens)
    ours = patch_linear(embed.proj, visible_patches(images, plan, 4))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_images_that_do_not_hold_the_units_are_refused() -> None:
    (plan,) = block_plans(random_permutation(1, 4, generator(0)), (2, 2), [1])
    for size in ((63, 64), (64, 96), (20, 20)):
        with pytest.raises(ValueError, match="do not match the plan's 2 x 2 units of patches of 4 pixels"):
            visible_patches(torch.zeros(1, 3, *size), plan, 4)


def test_masked_softmax_is_the_same_in_half_precision_up_to_rounding() -> None:
    (plan,) = block_plans(random_permutation(BATCH, 16, generator(0), per_batch=True), (4, 4), [5], [4], True)
    with forked_rng("attention"):
        attention = WindowAttention(WIDTH, HEADS, window_size=3)
    groups = answer(plan, LevelRequirements(0, 4, WIDTH, (3, 3), ((1, 1),))).groups[1, 1]
    _, visible = tokens_of(plan)
    table = attention.relative_position_bias_table
    exact = window_attention(attention, visible, groups, table)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = window_attention(attention, visible, groups, table)
    rounded.float().square().sum().backward()
    assert table.grad is not None
    assert torch.isfinite(table.grad).all()
    torch.testing.assert_close(rounded.float(), exact, rtol=0.05, atol=0.02)
    assert F.mse_loss(rounded.float(), exact) > 0
