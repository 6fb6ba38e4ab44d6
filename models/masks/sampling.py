"""Which masked tokens a partial decoder really decodes (PR-MIM, papers.md 2.3): the others are thrown.

A sampler is a pure function of index tensors and of one random rank per token, so that it gives the same answer on
every device and for every batch size. `masking.partial_plan` serves callers. To add one: a function and a line in
`SAMPLERS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# (masked (B, Nm), visible (B, Nv), grid of tokens, how many to keep, rank (B, N)) -> (B, kept), a subset of `masked`.
# `rank` is a random permutation of 0..N-1 per sample and settles whatever the sampler leaves open.
Sampler = Callable[[Tensor, Tensor, tuple[int, int], int, Tensor], Tensor]


def kept_count(tokens: int, visible_tokens: int, throw_ratio: float) -> int:
    """How many masked tokens are decoded: N_k = int(N (1 - t)) - N_v, t being a share of *all* N tokens (papers.md
    2.2).

    Raises ValueError if t lies outside [0, 1) or leaves no masked token to the decoder; it names the largest t.
    """
    # The small term undoes the rounding of 1 - t: ten tokens at 0.9 leave one, not int(0.9999999999999998).
    decoded = int(tokens * (1.0 - throw_ratio) + 1e-9) if 0.0 <= throw_ratio < 1.0 else 0
    if decoded > visible_tokens:
        return decoded - visible_tokens
    most = most_thrown(tokens, visible_tokens)
    if not 0.0 <= throw_ratio < 1.0:
        raise ValueError(
            f"decoder.throw_ratio is {throw_ratio}; it is a share of all tokens, from 0 to at most {most:g} here"
        )
    raise ValueError(
        f"decoder.throw_ratio {throw_ratio} of {tokens} tokens leaves the decoder {decoded}, of which {visible_tokens} are "
        f"visible, so that no masked one is decoded; the most is {most:g} at this mask.ratio"
    )


def most_thrown(tokens: int, visible_tokens: int) -> float:
    """The largest throw ratio that leaves one masked token to decode, rounded down to four digits: it can be copied."""
    return math.floor((1.0 - (visible_tokens + 1) / tokens) * 1e4 + 1e-6) / 1e4


def furthest(masked: Tensor, visible: Tensor, grid: tuple[int, int], kept: int, rank: Tensor) -> Tensor:
    """Furthest sampling among the masked tokens: from a random one on, always the masked token that is furthest from
    those already kept (papers.md 2.3 step 2).

    At N = 196, 75 % masked and t = 0.5 every thrown token has a kept one beside it, so that a 3 x 3 recovery works.
    """
    return _spread(masked, None, grid, kept, rank)


def furthest_from_visible(
    masked: Tensor, visible: Tensor, grid: tuple[int, int], kept: int, rank: Tensor
) -> Tensor:
    """As `furthest`, with the visible tokens taken as kept already: for a recovery that reads kept and visible ones."""
    return _spread(masked, visible, grid, kept, rank)


def at_random(masked: Tensor, visible: Tensor, grid: tuple[int, int], kept: int, rank: Tensor) -> Tensor:
    """A uniformly random subset: the baseline."""
    return masked.gather(1, rank.gather(1, masked).argsort(dim=1)[:, :kept])


def cells(masked: Tensor, visible: Tensor, grid: tuple[int, int], kept: int, rank: Tensor) -> Tensor:
    """A repeated pattern, as in VideoMAE V2: of each cell of 2 x 2 tokens one diagonal is kept, the same in a whole
    sample and drawn anew for every sample.

    The count is met exactly: masked tokens on the diagonals come first, others fill up, both in random order.
    """
    tokens = rank.shape[1]
    diagonal = (masked // grid[1] + masked % grid[1]) % 2
    chosen = rank[:, :1] % 2  # the rank of one fixed token is as good as a coin
    off = (diagonal != chosen).to(rank.dtype)
    return masked.gather(1, (rank.gather(1, masked) + off * tokens).argsort(dim=1)[:, :kept])


SAMPLERS: dict[str, Sampler] = {
    "furthest": furthest,
    "furthest_from_visible": furthest_from_visible,
    "random": at_random,
    "cells": cells,
}


def not_kept(masked: Tensor, kept: Tensor, tokens: int) -> Tensor:
    """masked: (B, Nm), kept: (B, Nk) a subset of it -> (B, Nm - Nk), the others in the order of `masked`."""
    is_kept = torch.zeros(masked.shape[0], tokens, dtype=torch.uint8, device=masked.device)
    is_kept.scatter_(1, kept, 1)
    others = is_kept.gather(1, masked).argsort(dim=1, stable=True)[:, : masked.shape[1] - kept.shape[1]]
    return masked.gather(1, others)


def _spread(masked: Tensor, seeds: Tensor | None, grid: tuple[int, int], kept: int, rank: Tensor) -> Tensor:
    """Greedy furthest-point sampling of `kept` tokens out of `masked`, away from `seeds` too; whole batch at once.

    The score of a token is N d^2 + rank, d its distance to the nearest token kept so far: a whole number, different
    for each token of a sample, so that the largest is the same one on every device. No table of N x N distances is
    needed: d^2 is a sum over rows and columns.
    """
    rows, columns = grid
    batch, tokens = rank.shape
    far = rows**2 + columns**2  # above every squared distance
    # Half the memory traffic where the scores fit, as they do up to 181 x 181 tokens.
    rank = rank.to(torch.int32 if tokens * (far + 1) < 2**31 else torch.int64)
    row_gaps, column_gaps = (_squared_gaps(side, rank) for side in grid)

    # None: nothing is kept yet, and the highest rank begins.
    nearest = far if seeds is None else _squared_distances(seeds, row_gaps, column_gaps, far)
    candidates = torch.zeros_like(rank, dtype=torch.bool).scatter_(1, masked, True)
    score = (nearest * tokens + rank).where(candidates, -1)
    row_gaps, column_gaps = row_gaps * tokens, column_gaps * tokens
    chosen = torch.empty(batch, kept, dtype=torch.int64, device=masked.device)
    for step in range(kept):
        token = score.argmax(dim=1)  # (B,)
        chosen[:, step] = token
        gaps = row_gaps[token // columns].unsqueeze(2) + column_gaps[token % columns].unsqueeze(1)
        # A token once kept has d = 0 and so scores below every candidate that is left.
        score = torch.minimum(score, gaps.view(batch, tokens) + rank)
    return chosen


def _squared_gaps(side: int, like: Tensor) -> Tensor:
    """(side, side): (i - j)^2."""
    places = torch.arange(side, dtype=like.dtype, device=like.device)
    return (places.unsqueeze(1) - places).square()


def _squared_distances(seeds: Tensor, row_gaps: Tensor, column_gaps: Tensor, far: int) -> Tensor:
    """(B, N): every token's squared distance to the nearest of `seeds` (B, M >= 1), first along rows, then along
    columns, both exact."""
    rows, columns = row_gaps.shape[0], column_gaps.shape[0]
    blank = torch.full((seeds.shape[0], rows * columns), far, dtype=row_gaps.dtype, device=seeds.device)
    apart = blank.scatter_(1, seeds, 0).view(-1, rows, columns)
    along = (apart.unsqueeze(2) + column_gaps).amin(
        dim=3
    )  # (B, rows, columns, columns) -> (B, rows, columns)
    both = (along.transpose(1, 2).unsqueeze(2) + row_gaps).amin(dim=3)  # (B, columns, rows)
    return both.transpose(1, 2).flatten(1)
