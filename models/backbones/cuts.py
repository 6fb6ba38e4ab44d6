"""Where a hierarchical encoder can be cut into blocks: after a level, or inside one after an even number of its layers.

Layers of a level alternate in kind (shifted windows, global attention), and every block begins with the first kind. Numbers
only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from bim.models.backbones.backbone import split_layers


@dataclass(frozen=True)
class Span:
    """Layers start..end - 1 of a level, run by one block. With start 0 it begins with what opens the level."""

    level: int
    start: int
    end: int


def spans_between(level_ends: Sequence[int], start: int, end: int) -> tuple[Span, ...]:
    """The layers start..end - 1 of the whole model, level by level. level_ends: layers up to the end of each level."""
    spans = []
    for level, (first, last) in enumerate(zip((0, *level_ends[:-1]), level_ends, strict=True)):
        if start < last and end > first:
            spans.append(Span(level, max(start, first) - first, min(end, last) - first))
    return tuple(spans)


def cut(name: str, layers: Sequence[int], blocks: int | Sequence[int]) -> tuple[int, ...]:
    """Layers up to the end of each block. layers: of each level.

    blocks: how many; up to the number of levels, these are spread over them, and beyond it the longest level is cut too,
    into pieces as equal as can be. Or their sizes in layers. Raises ValueError if a block would end elsewhere than after a
    level or after an even number of a level's layers.
    """
    level_ends = tuple(accumulate(layers))
    longest = max(range(len(layers)), key=lambda level: layers[level])
    if isinstance(blocks, int):
        more = blocks - len(layers)
        if more <= 0:
            return tuple(level_ends[end - 1] for end in accumulate(split_layers(len(layers), blocks)))
        pairs = (layers[longest] + 1) // 2
        if more + 1 > pairs:
            raise ValueError(
                f"blocks is {blocks}, but a number of blocks cuts '{name}' into {len(layers) + pairs - 1} at most: after "
                f"its levels of {', '.join(map(str, layers))} layers, and inside the longest after every second layer; a "
                "list of sizes may cut every level after an even number of its layers"
            )
        first = level_ends[longest] - layers[longest]
        inside = [first + 2 * end for end in accumulate(split_layers(pairs, more + 1))][:-1]
        return tuple(sorted({*level_ends, *inside}))
    sizes = list(blocks)
    ends = tuple(accumulate(sizes))
    allowed = {end - left for end, count in zip(level_ends, layers, strict=True) for left in lefts(count)}
    if not ends or ends[-1] != level_ends[-1] or min(sizes) < 1 or not set(ends) <= allowed:
        raise ValueError(
            f"blocks {sizes} end after {', '.join(map(str, ends)) or 'no'} layers, but '{name}' can be cut only where a "
            f"level ends or after an even number of its layers: after {', '.join(map(str, sorted(allowed)))} layers, the "
            "last of which must be reached"
        )
    return ends


def lefts(layers: int) -> list[int]:
    """How many of a level's layers may be left behind a cut: none, or those after an even number."""
    return [0, *(layers - before for before in range(2, layers, 2))]
