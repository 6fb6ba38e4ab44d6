from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.masking import block_plans, random_order, visible_counts
from models.seeding import generator


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
        block_plans(random_order(batch, units, generator(seed)), grid, counts), counts, strict=True
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
    plans = block_plans(random_order(batch, grid[0] * grid[1], generator(seed)), grid, counts)
    for earlier, later in pairwise(plans):
        assert torch.equal(earlier.keep[:, : later.visible], later.keep)


@settings(max_examples=50, deadline=None)
@given(families(), st.integers(0, 2**32))
def test_newly_dropped_units_are_those_that_the_first_block_saw(
    family: tuple[int, tuple[int, int], list[int]], seed: int
) -> None:
    batch, grid, counts = family
    plans = block_plans(random_order(batch, grid[0] * grid[1], generator(seed)), grid, counts)
    for plan in plans:
        dropped = plan.newly_dropped(plan.masked)
        for sample in range(batch):
            seen_first = set(plans[0].keep[sample].tolist())
            assert dropped[sample].tolist() == [unit in seen_first for unit in plan.masked[sample].tolist()]


def test_orders_are_per_sample_and_a_function_of_the_generator() -> None:
    order = random_order(64, 16, generator(0, "mask", 5))
    assert torch.equal(order, random_order(64, 16, generator(0, "mask", 5)))
    assert not torch.equal(order, random_order(64, 16, generator(0, "mask", 6)))
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
def test_ratios_that_cannot_be_honoured_are_refused(units: int, ratios: list[float], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        visible_counts(units, ratios)


@pytest.mark.parametrize(("grid", "visible"), [((3, 4), [4]), ((4, 4), [4, 8]), ((4, 4), [16]), ((4, 4), [])])
def test_plans_that_do_not_fit_their_order_are_refused(grid: tuple[int, int], visible: list[int]) -> None:
    with pytest.raises(ValueError, match=r"grid|visible counts"):
        block_plans(random_order(2, 16, generator(0)), grid, visible)


def test_a_plan_moves_to_a_device_whole() -> None:
    plan = block_plans(random_order(2, 16, generator(0)), (4, 4), [8, 4])[1].to("meta")
    assert {plan.order.device.type, plan.decode.device.type, plan.thrown.device.type} == {"meta"}
    assert (plan.visible, plan.first_visible, plan.grid) == (4, 8, (4, 4))
