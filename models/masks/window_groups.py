"""Windows of uneven occupancy packed into groups of one size, so that attention runs on visible tokens only (GreenMIM,
papers.md 4.2).

Pure functions over counts and coordinates, on the CPU, that return a frozen record of index tensors. Knows no model and no
mask plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bim.models.tokens import gather_tokens

Pair = tuple[int, int]
# GreenMIM's: up to this many windows' worth of tokens make one group, attention being masked by window.
SINGLE_GROUP_WINDOWS = 2


@dataclass(frozen=True, eq=False)
class WindowGroups:
    """T tokens per sample as G groups of g slots each; a window lies whole in one group, and no token in two slots.

    The first dimension P is 1 if one grouping serves the whole batch, else B.

    slots: (P, G * g) int64, the token in each slot; slots left over hold token 0, and nobody sees them.
    places: (P, T) int64, the slot of each token: the inverse.
    pairs: (P, G, g, g) int32, for each (query, key) of a group the row of a table of relative positions, or `apart` if the
    query must not see the key. A slot left over sees itself alone.
    apart: (2 h - 1) (2 w - 1), the number of rows of the table of an h x w window.
    in_order: the slots are the tokens as they come, one group of all.
    """

    slots: Tensor
    places: Tensor
    pairs: Tensor
    apart: int
    in_order: bool

    @property
    def count(self) -> int:
        """G, groups per sample."""
        return self.pairs.shape[1]

    @property
    def size(self) -> int:
        """g, slots per group."""
        return self.pairs.shape[2]

    def group(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, G * g, C)."""
        return x if self.in_order else take(x, self.slots)

    def restore(self, x: Tensor) -> Tensor:
        """(B, G * g, C) -> (B, T, C): the tokens in their own order, slots left over dropped."""
        return x if self.in_order else take(x, self.places)

    def to(self, device: torch.device | str) -> WindowGroups:
        """The same groups with their indices on `device`."""
        slots, places, pairs = (
            index.to(device, non_blocking=True) for index in (self.slots, self.places, self.pairs)
        )
        return replace(self, slots=slots, places=places, pairs=pairs)


def take(x: Tensor, index: Tensor) -> Tensor:
    """x: (B, N, C), index: (1, M) for all samples or (B, M) -> (B, M, C)."""
    return x.index_select(1, index[0]) if index.shape[0] == 1 else gather_tokens(x, index)


def window_on(grid: Pair, window: Pair, shift: Pair) -> tuple[Pair, Pair]:
    """The (window, shift) that a grid of tokens really has: along an axis that fits into one window, the whole axis and no
    shift, as in timm."""
    fitted = tuple(
        (side, 0) if side <= width else (width, moved)
        for side, width, moved in zip(grid, window, shift, strict=True)
    )
    return (fitted[0][0], fitted[1][0]), (fitted[0][1], fitted[1][1])


def window_of(rows: np.ndarray, columns: np.ndarray, window: Pair, shift: Pair) -> np.ndarray:
    """The number of the window that each token (row, column) lies in; same shape.

    Windows start at `shift` and those at the border are cut off by it, which is what Swin's cyclic roll and its mask come
    to: nothing is rolled.
    """
    down = (rows + (window[0] - shift[0])) // window[0]
    across = (columns + (window[1] - shift[1])) // window[1]
    found: np.ndarray = down * (across.max() + 1) + across
    return found


def fullest(counts: Sequence[int], capacity: int) -> list[int]:
    """Indices of counts with the largest sum that does not exceed `capacity`: 0/1 knapsack by dynamic programming.

    The sums that can be reached are the bits of one integer. Among equals that one is chosen which ends first.
    """
    reach, before, bits = 1, [], (1 << (capacity + 1)) - 1
    for count in counts:
        before.append(reach)
        reach |= (reach << count) & bits
        if reach >> capacity:  # full
            break
    total, chosen = reach.bit_length() - 1, []
    for index in reversed(range(len(before))):
        if not before[index] >> total & 1:
            chosen.append(index)
            total -= counts[index]
    return chosen[::-1]


def pack(counts: Sequence[int], capacity: int) -> tuple[tuple[int, ...], ...]:
    """Groups of windows (indices of `counts`), each as full as those that the groups before it have left allow.

    counts: tokens per window, none empty. Of equals the larger windows go first, which leaves the small ones to fill gaps.
    Raises ValueError if a window is empty or does not fit into a group.
    """
    if counts and not 0 < min(counts) <= max(counts) <= capacity:
        raise ValueError(f"windows of {min(counts)} to {max(counts)} tokens do not fit groups of {capacity}")
    left = sorted(range(len(counts)), key=lambda index: -counts[index])
    groups = []
    while left:
        chosen = fullest([counts[index] for index in left], capacity)
        groups.append(tuple(left[place] for place in chosen))
        taken = set(chosen)
        left = [index for place, index in enumerate(left) if place not in taken]
    return tuple(groups)


def released_size(counts: Sequence[Sequence[int]], window: Pair) -> int:
    """Slots per group by the rule of GreenMIM's released code: all tokens in one group if they are few, else the fullest
    window. counts: tokens per window, for each sample."""
    tokens = sum(counts[0])
    if tokens <= SINGLE_GROUP_WINDOWS * window[0] * window[1]:
        return tokens
    return max(max(sample) for sample in counts)


def swept_size(counts: Sequence[Sequence[int]], width: int) -> int:
    """Slots per group by GreenMIM's full sweep, from the fullest window to all tokens: those that cost least.

    counts: tokens per window, for each sample. width: C of the tokens. See `attention_cost`.
    """
    tokens = sum(counts[0])
    best, least = tokens, float("inf")
    for size in range(max(max(sample) for sample in counts), tokens + 1):
        # No packing wastes less than none, and that bound only grows.
        if attention_cost(1, size, width) * tokens / size >= least:
            break
        cost = attention_cost(max(len(pack(sample, size)) for sample in counts), size, width)
        if cost < least:
            best, least = size, cost
    return best


def attention_cost(groups: int, size: int, width: int) -> int:
    """Multiplications of attention over groups of `size` slots: G (4 g C^2 + 2 g^2 C)."""
    return groups * (4 * size * width**2 + 2 * size**2 * width)


def window_groups(
    rows: np.ndarray,
    columns: np.ndarray,
    window: Pair,
    shift: Pair,
    table: Pair,
    width: int,
    sweep: bool = False,
) -> WindowGroups:
    """Group tokens by window.

    rows, columns: (P, T) ints, where each token lies on its grid. window, shift: (height, width) as `window_on` gives them.
    table: the window that the table of relative positions is made for, at least as large. width: C, for the sweep.
    sweep: choose the size of groups by the full sweep instead of the released rule; dearer, seldom better by much.
    Packing is done sample by sample on the host; P = 1 is what makes it cheap.
    """
    samples, tokens = rows.shape
    windows, counts = [], []
    for found in window_of(rows, columns, window, shift):
        _, numbers, occupied = np.unique(found, return_inverse=True, return_counts=True)
        windows.append(numbers.reshape(-1))
        counts.append(occupied.tolist())
    size = swept_size(counts, width) if sweep else released_size(counts, window)
    if size == tokens:
        count, places = 1, np.broadcast_to(np.arange(tokens), (samples, tokens))
    else:
        packed = [pack(sample, size) for sample in counts]
        count = max(len(groups) for groups in packed)
        places = np.stack(
            [slots_of(groups, numbers, size) for groups, numbers in zip(packed, windows, strict=True)]
        )
    slots = np.zeros((samples, count * size), dtype=np.int64)
    # A number of its own for every slot left over: it shares a window with itself alone.
    inside = np.broadcast_to(-1 - np.arange(count * size), slots.shape).copy()
    np.put_along_axis(slots, places, np.arange(tokens)[None], axis=1)
    np.put_along_axis(inside, places, np.stack(windows), axis=1)
    where = [np.take_along_axis(values, slots, axis=1) for values in (rows, columns)]
    shape = (samples, count, size)
    pairs = pair_rows(inside.reshape(shape), where[0].reshape(shape), where[1].reshape(shape), table)
    return WindowGroups(
        slots=torch.from_numpy(slots),
        places=torch.from_numpy(places.astype(np.int64)),
        pairs=torch.from_numpy(pairs),
        apart=table_rows(table),
        in_order=size == tokens,
    )


def slots_of(groups: Sequence[Sequence[int]], windows: np.ndarray, size: int) -> np.ndarray:
    """(T,) the slot of each token: group after group, window after window. windows: (T,) the window of each token."""
    group_of = np.empty(sum(len(group) for group in groups), dtype=np.int64)
    for number, group in enumerate(groups):
        group_of[list(group)] = number
    mine = group_of[windows]
    order = np.lexsort((windows, mine))
    first = np.searchsorted(mine[order], np.arange(len(groups)))
    slots = np.empty_like(mine)
    slots[order] = mine[order] * size + np.arange(len(mine)) - first[mine[order]]
    return slots


def table_rows(window: Pair) -> int:
    """Rows of Swin's table of relative positions: one per difference of two places in a window."""
    return (2 * window[0] - 1) * (2 * window[1] - 1)


def pair_rows(windows: np.ndarray, rows: np.ndarray, columns: np.ndarray, table: Pair) -> np.ndarray:
    """(..., g) windows and coordinates -> (..., g, g) int32: rows of the table for (query, key) of one window, else its
    number of rows."""
    together = windows[..., :, None] == windows[..., None, :]
    down = rows[..., :, None] - rows[..., None, :] + table[0] - 1
    across = columns[..., :, None] - columns[..., None, :] + table[1] - 1
    found: np.ndarray = np.where(together, down * (2 * table[1] - 1) + across, table_rows(table)).astype(
        np.int32
    )
    return found
