"""Samplers that choose which masked tokens a partial decoder decodes; the others are thrown (PR-MIM, arXiv 2411.15746).

A sampler is a pure function of index tensors and of one random rank per token, equal on every device and for every
batch size; `plan.partial_plan` calls it. To add one: a function and a line in `SAMPLERS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Sampler = Callable[[Tensor, Tensor, tuple[int, int], int, Tensor], Tensor]
"""(masked (B, Nm), visible (B, Nv), grid of tokens, number to keep, rank (B, N)) -> (B, num_kept), a subset of `masked`.

`rank` is a random permutation of 0..N-1 per sample that breaks ties.
"""


def kept_count(tokens: int, visible_tokens: int, throw_ratio: float) -> int:
    """Number of masked tokens that are decoded: N_k = int(N (1 - t)) - N_v, t a fraction of *all* N tokens.

    Raises ValueError, naming the largest t, if t lies outside [0, 1) or leaves no masked token to the decoder.
    """
    # The small term undoes the rounding of 1 - t: ten tokens at 0.9 leave one, not int(0.9999999999999998) = 0.
    decoded = int(tokens * (1.0 - throw_ratio) + 1e-9) if 0.0 <= throw_ratio < 1.0 else 0
    if decoded > visible_tokens:
        return decoded - visible_tokens
    max_ratio = max_throw_ratio(tokens, visible_tokens)
    if not 0.0 <= throw_ratio < 1.0:
        raise ValueError(
            f"decoder.throw_ratio is {throw_ratio}; it is a fraction of all tokens, from 0 to at most {max_ratio:g} here"
        )
    raise ValueError(
        f"decoder.throw_ratio {throw_ratio} of {tokens} tokens leaves the decoder {decoded}, of which {visible_tokens} are "
        f"visible, so that no masked one is decoded; the most is {max_ratio:g} at this mask.ratio"
    )


def max_throw_ratio(tokens: int, visible_tokens: int) -> float:
    """The largest throw ratio that leaves one masked token to decode, rounded down to four digits."""
    return math.floor((1.0 - (visible_tokens + 1) / tokens) * 1e4 + 1e-6) / 1e4


def farthest_point_sampling(
    masked: Tensor, visible: Tensor, grid: tuple[int, int], num_kept: int, rank: Tensor
) -> Tensor:
    """PR-MIM's furthest sampling: start at a random masked token, then add the masked token farthest from those kept.

    At N = 196, 75 % masked and t = 0.5 every thrown token has a kept neighbor, which a 3 x 3 recovery needs.
    """
    return _spread(masked, None, grid, num_kept, rank)


def farthest_from_visible(
    masked: Tensor, visible: Tensor, grid: tuple[int, int], num_kept: int, rank: Tensor
) -> Tensor:
    """As `farthest_point_sampling`, with the visible tokens counted as kept: for a recovery that reads both."""
    return _spread(masked, visible, grid, num_kept, rank)


def uniform(masked: Tensor, visible: Tensor, grid: tuple[int, int], num_kept: int, rank: Tensor) -> Tensor:
    """A uniformly random subset."""
    return masked.gather(1, rank.gather(1, masked).argsort(dim=1)[:, :num_kept])


def checkerboard(
    masked: Tensor, visible: Tensor, grid: tuple[int, int], num_kept: int, rank: Tensor
) -> Tensor:
    """VideoMAE V2's running cells (arXiv 2303.16727): one diagonal of each 2 x 2 square of tokens, drawn per sample.

    Exactly `num_kept` tokens are returned: those on the diagonals first, then others, both in random order.
    """
    tokens = rank.shape[1]
    diagonal = (masked // grid[1] + masked % grid[1]) % 2
    drawn_diagonal = rank[:, :1] % 2  # the parity of one token's rank is a fair coin
    is_off = (diagonal != drawn_diagonal).to(rank.dtype)
    return masked.gather(1, (rank.gather(1, masked) + is_off * tokens).argsort(dim=1)[:, :num_kept])


SAMPLERS: dict[str, Sampler] = {
    "furthest": farthest_point_sampling,
    "furthest_from_visible": farthest_from_visible,
    "random": uniform,
    "cells": checkerboard,
}


def complement(masked: Tensor, kept: Tensor, tokens: int) -> Tensor:
    """masked: (B, Nm), kept: (B, Nk) a subset -> (B, Nm - Nk), the others in the order of `masked`."""
    is_kept = torch.zeros(masked.shape[0], tokens, dtype=torch.uint8, device=masked.device)
    is_kept.scatter_(1, kept, 1)
    kept_last = is_kept.gather(1, masked).argsort(dim=1, stable=True)
    return masked.gather(1, kept_last[:, : masked.shape[1] - kept.shape[1]])


def _spread(
    masked: Tensor, seeds: Tensor | None, grid: tuple[int, int], num_kept: int, rank: Tensor
) -> Tensor:
    """Greedy farthest-point sampling of `num_kept` tokens out of `masked`, away from `seeds` too, for the whole batch.

    The score of a token is N d^2 + rank, d its distance to the nearest token kept so far: a whole number, different
    for each token of a sample, so that the maximum is the same on every device. d^2 is a sum over rows and columns,
    which avoids a table of N x N distances.
    """
    rows, columns = grid
    batch, tokens = rank.shape
    far = rows**2 + columns**2  # above every squared distance
    # int32 halves the memory traffic; the scores fit up to 181 x 181 tokens.
    rank = rank.to(torch.int32 if tokens * (far + 1) < 2**31 else torch.int64)
    row_gaps, column_gaps = (_squared_gaps(side, rank) for side in grid)

    # Without seeds the token of the highest rank is the first.
    nearest = far if seeds is None else _squared_distances(seeds, row_gaps, column_gaps, far)
    candidates = torch.zeros_like(rank, dtype=torch.bool).scatter_(1, masked, True)
    score = (nearest * tokens + rank).where(candidates, -1)
    row_gaps, column_gaps = row_gaps * tokens, column_gaps * tokens
    chosen = torch.empty(batch, num_kept, dtype=torch.int64, device=masked.device)
    for step in range(num_kept):
        token = score.argmax(dim=1)  # (B,)
        chosen[:, step] = token
        gaps = row_gaps[token // columns].unsqueeze(2) + column_gaps[token % columns].unsqueeze(1)
        # A kept token has d = 0 and scores below every remaining candidate.
        score = torch.minimum(score, gaps.view(batch, tokens) + rank)
    return chosen


def _squared_gaps(side: int, like: Tensor) -> Tensor:
    """(side, side): (i - j)^2."""
    positions = torch.arange(side, dtype=like.dtype, device=like.device)
    return (positions.unsqueeze(1) - positions).square()


def _squared_distances(seeds: Tensor, row_gaps: Tensor, column_gaps: Tensor, far: int) -> Tensor:
    """(B, N): the exact squared distance of each token to the nearest of `seeds` (B, M >= 1)."""
    rows, columns = row_gaps.shape[0], column_gaps.shape[0]
    unseeded = torch.full((seeds.shape[0], rows * columns), far, dtype=row_gaps.dtype, device=seeds.device)
    seed_distances = unseeded.scatter_(1, seeds, 0).view(-1, rows, columns)
    # (B, rows, columns, columns) -> (B, rows, columns)
    along_rows = (seed_distances.unsqueeze(2) + column_gaps).amin(dim=3)
    # (B, columns, rows, rows) -> (B, columns, rows)
    distances = (along_rows.transpose(1, 2).unsqueeze(2) + row_gaps).amin(dim=3)
    return distances.transpose(1, 2).flatten(1)
