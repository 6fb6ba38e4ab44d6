"""What short forms of settings stand for: two mask ratios for every block, a fraction for an epoch."""

from __future__ import annotations

from collections.abc import Sequence


def ratios_by_block(ratio: float | Sequence[float], blocks: int) -> tuple[float, ...]:
    """What `mask.ratio` means: one number holds for all blocks, two are the first block's and the last one's, with even
    steps between (a single block has the last), others are listed."""
    if not isinstance(ratio, Sequence):
        return (ratio,) * blocks
    if len(ratio) != 2:
        return tuple(ratio)
    first, last = ratio
    return tuple(round(last + (first - last) * k / max(blocks - 1, 1), 4) for k in reversed(range(blocks)))


def start_epoch(start: float, epochs: int) -> int:
    """The epoch with which a phase begins: a whole number is one, a fraction is of the run's epochs."""
    return start if isinstance(start, int) else round(start * epochs)
