"""Group window attention: windows with uneven numbers of visible tokens, packed into groups of one size.

Attention then runs on visible tokens only (GreenMIM, arXiv 2205.13515). Pure functions over counts and coordinates on
the CPU that return a frozen record of index tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bim.models.tokens import gather_tokens

Pair = tuple[int, int]
# GreenMIM's released code puts up to this many windows' worth of tokens in one group.
SINGLE_GROUP_WINDOWS = 2


@dataclass(frozen=True, eq=False)
class WindowGroups:
    """T tokens per sample in G groups of g slots each; a window lies in one group, a token in one slot.

    The first dimension P is 1 if one grouping serves the whole batch, else B.

    token_of_slot: (P, G * g) int64; empty slots hold token 0, which no other slot attends to.
    slot_of_token: (P, T) int64, the inverse.
    bias_rows: (P, G, g, g) int32, for each (query, key) of a group the row of the relative position bias table, or
    `masked_row` if the query must not attend to the key. An empty slot attends to itself only.
    masked_row: (2 h - 1) (2 w - 1), the number of rows of the table of an h x w window.
    is_identity: there is one group, whose slots are the tokens in their order.
    """

    token_of_slot: Tensor
    slot_of_token: Tensor
    bias_rows: Tensor
    masked_row: int
    is_identity: bool

    @property
    def count(self) -> int:
        """G, groups per sample."""
        return self.bias_rows.shape[1]

    @property
    def size(self) -> int:
        """g, slots per group."""
        return self.bias_rows.shape[2]

    def group(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, G * g, C)."""
        return x if self.is_identity else take(x, self.token_of_slot)

    def restore(self, x: Tensor) -> Tensor:
        """(B, G * g, C) -> (B, T, C): the tokens in their order, without empty slots."""
        return x if self.is_identity else take(x, self.slot_of_token)

    def to(self, device: torch.device | str) -> WindowGroups:
        """The same groups with their indices on `device`."""
        return replace(
            self,
            token_of_slot=self.token_of_slot.to(device),
            slot_of_token=self.slot_of_token.to(device),
            bias_rows=self.bias_rows.to(device),
        )


def take(x: Tensor, index: Tensor) -> Tensor:
    """x: (B, N, C), index: (1, M) for all samples or (B, M) -> (B, M, C)."""
    return x.index_select(1, index[0]) if index.shape[0] == 1 else gather_tokens(x, index)


def window_on(grid: Pair, window: Pair, shift: Pair) -> tuple[Pair, Pair]:
    """The (window, shift) on a grid of tokens: along an axis that fits into one window, the whole axis without a shift,
    as in timm."""
    (height, down), (width, across) = (
        (side, 0) if side <= nominal else (nominal, offset)
        for side, nominal, offset in zip(grid, window, shift, strict=True)
    )
    return (height, width), (down, across)


def window_of(rows: np.ndarray, columns: np.ndarray, window: Pair, shift: Pair) -> np.ndarray:
    """The number of the window that each token (row, column) lies in; same shape.

    Windows start at `shift`, and the border cuts off those outside the grid: equal to Swin's masked cyclic shift.
    """
    down = (rows + (window[0] - shift[0])) // window[0]
    across = (columns + (window[1] - shift[1])) // window[1]
    window_number: np.ndarray = down * (across.max() + 1) + across
    return window_number


def knapsack(counts: Sequence[int], capacity: int) -> list[int]:
    """Indices of `counts` with the largest sum up to `capacity`: 0/1 knapsack by dynamic programming.

    The bits of one integer are the sums that can be reached. Of equal sums the one of the earliest counts is chosen.
    """
    sums, sums_before, bits = 1, [], (1 << (capacity + 1)) - 1
    for count in counts:
        sums_before.append(sums)
        sums |= (sums << count) & bits
        if sums >> capacity:  # full
            break
    total, chosen = sums.bit_length() - 1, []
    for index in reversed(range(len(sums_before))):
        if not sums_before[index] >> total & 1:
            chosen.append(index)
            total -= counts[index]
    return chosen[::-1]


def pack(counts: Sequence[int], capacity: int) -> tuple[tuple[int, ...], ...]:
    """Groups of windows (indices of `counts`), each as full as the remaining windows allow.

    counts: tokens per window. Of equals the larger windows go first, so that small ones fill the gaps.
    Raises ValueError if a window is empty or does not fit into a group.
    """
    if counts and not 0 < min(counts) <= max(counts) <= capacity:
        raise ValueError(f"windows of {min(counts)} to {max(counts)} tokens do not fit groups of {capacity}")
    remaining = sorted(range(len(counts)), key=lambda window: -counts[window])
    groups = []
    while remaining:
        chosen = set(knapsack([counts[window] for window in remaining], capacity))
        groups.append(tuple(window for rank, window in enumerate(remaining) if rank in chosen))
        remaining = [window for rank, window in enumerate(remaining) if rank not in chosen]
    return tuple(groups)


def default_group_size(counts: Sequence[Sequence[int]], window: Pair) -> int:
    """Slots per group as in GreenMIM's released code: all tokens if they are few, else those of the fullest window.

    counts: tokens per window, for each sample.
    """
    tokens = sum(counts[0])
    if tokens <= SINGLE_GROUP_WINDOWS * window[0] * window[1]:
        return tokens
    return max(max(sample) for sample in counts)


def optimal_group_size(counts: Sequence[Sequence[int]], width: int) -> int:
    """Slots per group by GreenMIM's optimal grouping: the cheapest size from the fullest window to all tokens.

    counts: tokens per window, for each sample. width: C of the tokens. See `attention_cost`.
    """
    tokens = sum(counts[0])
    best_size, lowest_cost = tokens, float("inf")
    for size in range(max(max(sample) for sample in counts), tokens + 1):
        # The cost without empty slots is a lower bound that grows with the size.
        if attention_cost(1, size, width) * tokens / size >= lowest_cost:
            break
        cost = attention_cost(max(len(pack(sample, size)) for sample in counts), size, width)
        if cost < lowest_cost:
            best_size, lowest_cost = size, cost
    return best_size


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

    rows, columns: (P, T) ints, positions of the tokens on their grid. window, shift: (height, width), see `window_on`.
    table: the window of the relative position bias table, at least as large. width: C. sweep: `optimal_group_size` in
    place of `default_group_size`, slower and seldom much better. Samples are packed one by one on the host.
    """
    samples, tokens = rows.shape
    windows, counts = [], []
    for sample_windows in window_of(rows, columns, window, shift):
        _, numbers, occupancy = np.unique(sample_windows, return_inverse=True, return_counts=True)
        windows.append(numbers.reshape(-1))
        counts.append(occupancy.tolist())
    size = optimal_group_size(counts, width) if sweep else default_group_size(counts, window)
    if size == tokens:
        num_groups, slot_of_token = 1, np.broadcast_to(np.arange(tokens), (samples, tokens))
    else:
        packings = [pack(sample, size) for sample in counts]
        num_groups = max(len(groups) for groups in packings)
        slot_of_token = np.stack(
            [slots_of(groups, numbers, size) for groups, numbers in zip(packings, windows, strict=True)]
        )
    token_of_slot = np.zeros((samples, num_groups * size), dtype=np.int64)
    # Every empty slot is a window of its own, numbered below 0: it attends to itself only.
    window_of_slot = np.broadcast_to(-1 - np.arange(num_groups * size), token_of_slot.shape).copy()
    np.put_along_axis(token_of_slot, slot_of_token, np.arange(tokens)[None], axis=1)
    np.put_along_axis(window_of_slot, slot_of_token, np.stack(windows), axis=1)
    grouped = (samples, num_groups, size)
    slot_rows, slot_columns = (
        np.take_along_axis(values, token_of_slot, axis=1).reshape(grouped) for values in (rows, columns)
    )
    return WindowGroups(
        token_of_slot=torch.from_numpy(token_of_slot),
        slot_of_token=torch.from_numpy(slot_of_token.astype(np.int64)),
        bias_rows=torch.from_numpy(
            bias_table_rows(window_of_slot.reshape(grouped), slot_rows, slot_columns, table)
        ),
        masked_row=num_table_rows(table),
        is_identity=size == tokens,
    )


def slots_of(groups: Sequence[Sequence[int]], windows: np.ndarray, size: int) -> np.ndarray:
    """(T,) slot of each token: group after group, window after window. windows: (T,) the window of each token."""
    group_of_window = np.empty(sum(len(group) for group in groups), dtype=np.int64)
    for number, group in enumerate(groups):
        group_of_window[list(group)] = number
    group_of_token = group_of_window[windows]
    permutation = np.lexsort((windows, group_of_token))
    sorted_groups = group_of_token[permutation]
    first_of_group = np.searchsorted(sorted_groups, np.arange(len(groups)))
    slots = np.empty_like(group_of_token)
    slots[permutation] = sorted_groups * size + np.arange(len(slots)) - first_of_group[sorted_groups]
    return slots


def num_table_rows(window: Pair) -> int:
    """Rows of Swin's relative position bias table: one per difference of two positions in a window."""
    return (2 * window[0] - 1) * (2 * window[1] - 1)


def bias_table_rows(windows: np.ndarray, rows: np.ndarray, columns: np.ndarray, table: Pair) -> np.ndarray:
    """(..., g) windows and coordinates -> (..., g, g) int32: the table row of each (query, key) of one window, else the
    table's number of rows."""
    is_same_window = windows[..., :, None] == windows[..., None, :]
    down = rows[..., :, None] - rows[..., None, :] + table[0] - 1
    across = columns[..., :, None] - columns[..., None, :] + table[1] - 1
    table_row = np.where(is_same_window, down * (2 * table[1] - 1) + across, num_table_rows(table))
    return table_row.astype(np.int32)
