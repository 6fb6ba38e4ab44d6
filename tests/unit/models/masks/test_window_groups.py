from __future__ import annotations

from collections.abc import Sequence
from dataclasses import FrozenInstanceError
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bim.models.masks.window_groups import (
    WindowGroups,
    attention_cost,
    default_group_size,
    knapsack,
    num_table_rows,
    optimal_group_size,
    pack,
    window_groups,
    window_of,
    window_on,
)

Pair = tuple[int, int]


def best_sum(counts: Sequence[int], capacity: int) -> int:
    """By trying every subset."""
    sums = (sum(some) for size in range(len(counts) + 1) for some in combinations(counts, size))
    return max(total for total in sums if total <= capacity)


@st.composite
def tokens_on_a_grid(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, Pair, Pair, Pair]:
    """Rows and columns of tokens of 1 to 3 samples, grid, window, shift."""
    grid = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    nominal = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    moved = (nominal[0] // 2, nominal[1] // 2) if draw(st.booleans()) else (0, 0)
    samples, cells = draw(st.integers(1, 3)), grid[0] * grid[1]
    tokens = draw(st.integers(1, cells))
    gen = np.random.default_rng(draw(st.integers(0, 10**6)))
    found = np.stack([gen.permutation(cells)[:tokens] for _ in range(samples)])
    return *np.divmod(found, grid[1]), grid, nominal, moved


def windows_by_hand(places: np.ndarray, side: int, window: int, shift: int) -> np.ndarray:
    """Which window along one axis each place lies in, from a list of where windows start."""
    starts = [0, *range(shift or window, side, window)]
    return np.array([max(i for i, start in enumerate(starts) if start <= place) for place in places])


def grouped(tokens: tuple[np.ndarray, np.ndarray, Pair, Pair, Pair], sweep: bool) -> WindowGroups:
    rows, columns, grid, nominal, moved = tokens
    return window_groups(
        rows, columns, *window_on(grid, nominal, moved), table=nominal, width=16, sweep=sweep
    )


@given(st.lists(st.integers(1, 12), min_size=1, max_size=9), st.integers(12, 25))
@settings(max_examples=150, deadline=None)
def test_every_group_is_the_fullest_that_what_is_left_allows(counts: list[int], capacity: int) -> None:
    groups = pack(counts, capacity)
    assert sorted(window for group in groups for window in group) == list(range(len(counts)))
    left = list(range(len(counts)))
    for group in groups:
        assert sum(counts[window] for window in group) == best_sum(
            [counts[window] for window in left], capacity
        )
        left = [window for window in left if window not in group]


def test_a_group_is_filled_exactly_where_the_first_windows_alone_would_not_fill_it() -> None:
    assert knapsack([6, 5, 4, 3], 10) == [0, 2]
    assert knapsack([5, 5, 5], 4) == []
    assert knapsack([], 4) == []
    assert pack([4, 5, 6, 5], 10) == ((1, 3), (2, 0))


@pytest.mark.parametrize(("counts", "capacity"), [([3, 0], 4), ([5, 2], 4)])
def test_windows_that_are_empty_or_too_large_are_refused(counts: list[int], capacity: int) -> None:
    with pytest.raises(ValueError, match=f"do not fit groups of {capacity}"):
        pack(counts, capacity)


def test_the_released_rule_makes_one_group_of_few_tokens_and_else_takes_the_fullest_window() -> None:
    assert default_group_size([[10] * 9 + [8]], (7, 7)) == 98
    assert default_group_size([[10] * 9 + [9]], (7, 7)) == 10
    assert default_group_size([[49, 49, 20], [40, 40, 38]], (7, 7)) == 49


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 64), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_the_sweep_finds_the_cheapest_of_all_sizes(counts: list[int], width: int, seed: int) -> None:
    other = np.random.default_rng(seed).multinomial(sum(counts), [1 / 7] * 7)
    samples = [counts, [int(count) for count in other if count]]
    sizes = range(max(map(max, samples)), sum(counts) + 1)
    costs = {
        size: attention_cost(max(len(pack(sample, size)) for sample in samples), size, width)
        for size in sizes
    }
    assert costs[optimal_group_size(samples, width)] == min(costs.values())


def test_the_cost_is_the_papers() -> None:
    assert attention_cost(3, 5, 7) == 3 * (4 * 5 * 7**2 + 2 * 5**2 * 7)


@given(tokens_on_a_grid())
@settings(max_examples=100, deadline=None)
def test_windows_are_cut_off_by_the_border_and_not_rolled_over_it(
    tokens: tuple[np.ndarray, np.ndarray, Pair, Pair, Pair],
) -> None:
    rows, columns, grid, nominal, moved = tokens
    window, shift = window_on(grid, nominal, moved)
    numbers = window_of(rows[0], columns[0], window, shift)
    down = windows_by_hand(rows[0], grid[0], window[0], shift[0])
    across = windows_by_hand(columns[0], grid[1], window[1], shift[1])
    together = (down[:, None] == down) & (across[:, None] == across)
    assert np.array_equal(numbers[:, None] == numbers, together)


def test_a_side_that_fits_one_window_is_one_window_as_in_timm() -> None:
    assert window_on((14, 7), (7, 7), (3, 3)) == ((7, 7), (3, 0))
    assert window_on((4, 5), (7, 7), (3, 3)) == ((4, 5), (0, 0))


@pytest.mark.parametrize("sweep", [False, True])
@given(tokens=tokens_on_a_grid())
@settings(max_examples=80, deadline=None)
def test_every_token_has_one_place_and_comes_back_to_its_own(
    sweep: bool, tokens: tuple[np.ndarray, np.ndarray, Pair, Pair, Pair]
) -> None:
    groups = grouped(tokens, sweep)
    samples, count = tokens[0].shape
    assert groups.token_of_slot.shape == (samples, groups.count * groups.size)
    assert all(len(set(row)) == count for row in groups.slot_of_token.tolist())
    x = torch.randn(samples, count, 3)
    assert groups.group(x).shape == (samples, groups.count * groups.size, 3)
    assert torch.equal(groups.restore(groups.group(x)), x)
    assert torch.equal(
        groups.token_of_slot.gather(1, groups.slot_of_token), torch.arange(count).expand(samples, -1)
    )


@pytest.mark.parametrize("sweep", [False, True])
@given(tokens=tokens_on_a_grid())
@settings(max_examples=80, deadline=None)
def test_a_token_sees_all_tokens_of_its_window_by_their_relative_positions_and_no_other(
    sweep: bool, tokens: tuple[np.ndarray, np.ndarray, Pair, Pair, Pair]
) -> None:
    rows, columns, grid, nominal, moved = tokens
    groups = grouped(tokens, sweep)
    window, shift = window_on(grid, nominal, moved)
    assert groups.masked_row == num_table_rows(nominal)
    for sample in range(len(rows)):
        numbers = window_of(rows[sample], columns[sample], window, shift)
        for token, place in enumerate(groups.slot_of_token[sample].tolist()):
            group, slot = divmod(place, groups.size)
            seen = {}
            for other, pair in enumerate(groups.bias_rows[sample, group, slot].tolist()):
                if pair != groups.masked_row:
                    key = int(groups.token_of_slot[sample, group * groups.size + other])
                    # No slot is left over.
                    assert int(groups.slot_of_token[sample, key]) == group * groups.size + other
                    seen[key] = divmod(pair, 2 * nominal[1] - 1)
            expected = {
                int(key): (
                    int(rows[sample, token] - rows[sample, key] + nominal[0] - 1),
                    int(columns[sample, token] - columns[sample, key] + nominal[1] - 1),
                )
                for key in np.flatnonzero(numbers == numbers[token])
            }
            assert seen == expected


@given(tokens=tokens_on_a_grid())
@settings(max_examples=50, deadline=None)
def test_no_slot_sees_nothing(tokens: tuple[np.ndarray, np.ndarray, Pair, Pair, Pair]) -> None:
    groups = grouped(tokens, sweep=False)
    assert (groups.bias_rows != groups.masked_row).any(dim=-1).all()


def test_groups_are_a_frozen_record_that_goes_to_a_device() -> None:
    rows, columns = np.divmod(np.arange(16)[None], 4)
    groups = window_groups(rows, columns, (2, 2), (0, 0), table=(2, 2), width=8)
    assert (groups.count, groups.size, groups.is_identity) == (4, 4, False)
    with pytest.raises(FrozenInstanceError):
        groups.masked_row = 3  # type: ignore[misc]
    moved = groups.to("meta")
    assert {
        moved.token_of_slot.device.type,
        moved.slot_of_token.device.type,
        moved.bias_rows.device.type,
    } == {"meta"}
    assert window_groups(rows[:, :8], columns[:, :8], (2, 2), (0, 0), (2, 2), 8).is_identity
