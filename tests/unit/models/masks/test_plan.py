from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bim.models.masks.plan import (
    block_plans,
    partial_plan,
    random_permutation,
    token_units,
    unit_tokens,
    visible_counts,
)
from bim.models.masks.sampling import SAMPLERS
from bim.models.seeding import generator


@st.composite
def families(draw: st.DrawFn) -> tuple[int, tuple[int, int], list[int]]:
    """(batch, grid, nested visible counts)"""
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(2, 6))
    counts = draw(st.lists(st.integers(1, rows * columns - 1), min_size=1, max_size=4))
    return draw(st.integers(1, 3)), (rows, columns), sorted(counts, reverse=True)


@settings(max_examples=50, deadline=None)
@given(families(), st.integers(0, 2**32))
def test_every_unit_is_either_kept_or_masked_in_every_block(
    family: tuple[int, tuple[int, int], list[int]], seed: int
) -> None:
    batch, grid, counts = family
    units = grid[0] * grid[1]
    for plan, count in zip(
        block_plans(random_permutation(batch, units, generator(seed)), grid, counts), counts, strict=True
    ):
        assert plan.keep.shape == (batch, count)
        assert plan.masked.shape == (batch, units - count)
        together = torch.cat([plan.keep, plan.masked], dim=1).sort(dim=1).values
        assert torch.equal(together, torch.arange(units).expand(batch, units))


@settings(max_examples=50, deadline=None)
@given(families(), st.integers(0, 2**32))
def test_visible_sets_are_nested_so_that_a_boundary_is_a_slice(
    family: tuple[int, tuple[int, int], list[int]], seed: int
) -> None:
    batch, grid, counts = family
    plans = block_plans(random_permutation(batch, grid[0] * grid[1], generator(seed)), grid, counts)
    for earlier, later in pairwise(plans):
        assert torch.equal(earlier.keep[:, : later.visible], later.keep)


@settings(max_examples=50, deadline=None)
@given(families(), st.integers(0, 2**32))
def test_newly_masked_units_are_those_that_the_first_block_saw(
    family: tuple[int, tuple[int, int], list[int]], seed: int
) -> None:
    batch, grid, counts = family
    plans = block_plans(random_permutation(batch, grid[0] * grid[1], generator(seed)), grid, counts)
    for plan in plans:
        dropped = plan.newly_masked(plan.masked)
        for sample in range(batch):
            seen_first = set(plans[0].keep[sample].tolist())
            assert dropped[sample].tolist() == [unit in seen_first for unit in plan.masked[sample].tolist()]


def test_orders_are_per_sample_and_a_function_of_the_generator() -> None:
    order = random_permutation(64, 16, generator(0, "mask", 5))
    assert torch.equal(order, random_permutation(64, 16, generator(0, "mask", 5)))
    assert not torch.equal(order, random_permutation(64, 16, generator(0, "mask", 6)))
    assert len({tuple(row) for row in order.tolist()}) == 64


def test_visible_counts_follow_the_papers_formula() -> None:
    assert visible_counts(196, [0.75] * 4) == (49,) * 4
    assert visible_counts(196, [0.6, 0.65, 0.7, 0.75]) == (78, 68, 58, 49)
    assert visible_counts(49, [0.75]) == (12,)


def test_visible_counts_are_not_lowered_by_the_rounding_of_decimal_ratios() -> None:
    assert visible_counts(10, [0.9]) == (1,)
    assert visible_counts(20, [0.9, 0.95]) == (2, 1)


@pytest.mark.parametrize(
    ("units", "ratios", "reason"),
    [
        (16, [0.0], "between 0 and 1"),
        (16, [1.0], "between 0 and 1"),
        (16, [-0.5], "between 0 and 1"),
        (16, [float("nan")], "between 0 and 1"),
        (16, [0.8, 0.7], "falls from 0.8"),
        (16, [0.95], "no visible unit out of 16"),
        (16, [1e-12], "no masked unit out of 16"),
        (16, [], "empty"),
    ],
)
def test_ratios_that_cannot_be_honored_are_refused(units: int, ratios: list[float], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        visible_counts(units, ratios)


@pytest.mark.parametrize(("grid", "visible"), [((3, 4), [4]), ((4, 4), [4, 8]), ((4, 4), [16]), ((4, 4), [])])
def test_plans_that_do_not_fit_their_order_are_refused(grid: tuple[int, int], visible: list[int]) -> None:
    with pytest.raises(ValueError, match=r"grid|visible counts"):
        block_plans(random_permutation(2, 16, generator(0)), grid, visible)


def test_a_plan_moves_to_a_device_whole() -> None:
    plan = block_plans(random_permutation(2, 16, generator(0)), (4, 4), [8, 4])[1].to("meta")
    assert {plan.permutation.device.type, plan.decode.device.type, plan.thrown.device.type} == {"meta"}
    assert (plan.visible, plan.first_visible, plan.grid) == (4, 8, (4, 4))


@settings(max_examples=50, deadline=None)
@given(families(), st.integers(1, 4), st.integers(0, 2**32))
def test_a_unit_is_a_square_of_tokens_at_every_scale(
    family: tuple[int, tuple[int, int], list[int]], scale: int, seed: int
) -> None:
    batch, grid, counts = family
    rows, columns = grid
    numbers = torch.arange(rows * columns * scale**2).view(rows * scale, columns * scale)
    plan = block_plans(random_permutation(batch, rows * columns, generator(seed)), grid, counts[:1], [scale])[
        0
    ]
    assert plan.token_grid == (rows * scale, columns * scale)
    for sample in range(batch):
        squares = [
            numbers[row * scale : (row + 1) * scale, column * scale : (column + 1) * scale].flatten()
            for row, column in (
                (unit // columns, unit % columns) for unit in plan.permutation[sample].tolist()
            )
        ]
        assert torch.equal(plan.keep_tokens[sample], torch.cat(squares[: counts[0]]))
        assert torch.equal(plan.masked[sample], torch.cat(squares[counts[0] :]))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4))
def test_every_token_lies_in_the_unit_that_it_was_made_from(rows: int, columns: int, scale: int) -> None:
    units = random_permutation(2, rows * columns, generator(0))
    tokens = unit_tokens(units, (rows, columns), scale)
    expected = units.repeat_interleave(scale**2, dim=1)
    assert torch.equal(token_units(tokens, (rows, columns), scale), expected)


def test_blocks_of_one_family_may_have_tokens_of_different_fineness() -> None:
    order = random_permutation(2, 16, generator(0))
    plans = block_plans(order, (4, 4), [8, 6, 4], [4, 2, 1])
    assert [plan.keep_tokens.shape[1] for plan in plans] == [128, 24, 4]
    assert [plan.masked.shape[1] for plan in plans] == [128, 40, 12]
    for plan, dropped in zip(plans, (0, 2, 4), strict=True):
        assert plan.newly_masked(plan.masked).sum(dim=1).tolist() == [dropped * plan.scale**2] * 2


def test_scale_one_leaves_units_and_tokens_the_same() -> None:
    order = random_permutation(2, 16, generator(0))
    for plain, scaled in zip(
        block_plans(order, (4, 4), [8, 4]), block_plans(order, (4, 4), [8, 4], [1, 1]), strict=True
    ):
        assert plain.token_grid == plain.grid == (4, 4)
        for plan in (plain, scaled):
            assert torch.equal(plan.keep_tokens, order[:, : plan.visible])
            assert torch.equal(plan.decode, order[:, plan.visible :])
            assert plan.thrown.shape == (2, 0)


@pytest.mark.parametrize("scales", [[2], [2, 2, 2], [2, 0], []])
def test_scales_that_do_not_go_with_the_blocks_are_refused(scales: list[int]) -> None:
    with pytest.raises(ValueError, match="scales"):
        block_plans(random_permutation(2, 16, generator(0)), (4, 4), [8, 4], scales)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("scale", [1, 2])
def test_a_partial_plan_divides_the_masked_tokens_and_changes_nothing_else(sampler: str, scale: int) -> None:
    plans = block_plans(random_permutation(3, 36, generator(0)), (6, 6), [12, 9], [scale, scale])
    for plan in plans:
        tokens, visible = 36 * scale**2, plan.visible * scale**2
        divided = partial_plan(plan, 0.5, sampler, generator(1))
        assert divided.decode.shape[1] == tokens // 2 - visible
        assert divided.thrown.shape[1] == tokens // 2
        assert torch.equal(divided.masked.sort(dim=1).values, plan.masked.sort(dim=1).values)
        assert torch.equal(divided.permutation, plan.permutation)
        assert (divided.visible, divided.first_visible, divided.scale) == (plan.visible, 12, scale)
        dropped = divided.newly_masked(divided.masked).sum(dim=1)
        assert dropped.tolist() == [(12 - plan.visible) * scale**2] * 3


def test_throwing_nothing_gives_the_plan_back_and_draws_nothing() -> None:
    plan, gen = block_plans(random_permutation(2, 16, generator(0)), (4, 4), [4])[0], generator(1)
    before = gen.get_state()
    assert partial_plan(plan, 0.0, "furthest", gen) is plan
    assert torch.equal(gen.get_state(), before)


def test_a_partial_plan_can_be_divided_again() -> None:
    plan = block_plans(random_permutation(2, 36, generator(0)), (6, 6), [9])[0]
    once = partial_plan(plan, 0.25, "random", generator(1))
    again = partial_plan(once, 0.5, "furthest", generator(2))
    assert (once.thrown.shape[1], again.thrown.shape[1]) == (9, 18)
    assert torch.equal(again.masked.sort(dim=1).values, plan.masked.sort(dim=1).values)


def test_partial_plans_that_cannot_be_honored_are_refused() -> None:
    plan = block_plans(random_permutation(2, 16, generator(0)), (4, 4), [4])[0]
    with pytest.raises(ValueError, match=r"decoder\.sampler is 'nearest'; it must be one of furthest"):
        partial_plan(plan, 0.0, "nearest", generator(0))
    with pytest.raises(ValueError, match=r"decoder\.throw_ratio 0\.75"):
        partial_plan(plan, 0.75, "furthest", generator(0))


def test_one_order_may_serve_the_whole_batch() -> None:
    shared = random_permutation(5, 16, generator(0), per_batch=True)
    assert shared.shape == (5, 16)
    assert torch.equal(shared, shared[:1].expand(5, -1))
    assert sorted(shared[0].tolist()) == list(range(16))
    assert torch.equal(shared[:1], random_permutation(1, 16, generator(0)))
    assert not torch.equal(shared[:1], random_permutation(5, 16, generator(1), per_batch=True)[:1])
