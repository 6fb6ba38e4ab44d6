"""Boundaries at which a backbone's layers are cut into blocks, and the layers between two of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise


@dataclass(frozen=True)
class CutRule:
    """Where a backbone can be cut: after every level, and inside a level after every `step` of its layers.

    step: None if levels cannot be cut. description: for messages.
    """

    step: int | None
    description: str

    def cuts_inside(self, layers: int) -> range:
        """Numbers of a level's first layers that a cut may separate from the rest of the level."""
        return range(self.step, layers, self.step) if self.step else range(0)


# A ViT is one level of equal layers.
AFTER_LAYERS = CutRule(1, "after every layer")
AFTER_LEVELS = CutRule(None, "where a level ends")
# Layers of Swin and Twins alternate in kind (shifted windows, global attention); every block starts with the first kind.
AFTER_LAYER_PAIRS = CutRule(2, "where a level ends or after an even number of its layers")


@dataclass(frozen=True)
class Span:
    """Layers start..end - 1 of a level in one block. With start 0 it includes the modules that open the level."""

    level: int
    start: int
    end: int


def block_boundaries(
    name: str, layers: Sequence[int], blocks: int | Sequence[int], rule: CutRule
) -> tuple[int, ...]:
    """Layers up to the end of each block of the backbone `name`. layers: of each level.

    blocks: their number, or their sizes in layers. Up to the number of levels, blocks are made of whole levels; beyond
    it the longest level is cut too, into pieces as equal as possible.
    Raises ValueError if the blocks do not hold all layers, or end elsewhere than `rule` allows.
    """
    if min(layers) < 1:
        raise ValueError(
            f"'{name}' has a level without layers; set its depth in backbone.model_args to 1 or more"
        )
    level_ends = tuple(accumulate(layers))
    if isinstance(blocks, int):
        if blocks <= len(layers):
            return tuple(level_ends[end - 1] for end in accumulate(equal_sizes(len(layers), blocks)))
        longest = max(range(len(layers)), key=lambda level: layers[level])
        inside = rule.cuts_inside(layers[longest])
        max_blocks = len(layers) + len(inside)
        if blocks > max_blocks:
            several = rule.step is not None and len(layers) > 1
            raise ValueError(
                f"blocks is {blocks}, but '{name}' has {' + '.join(map(str, layers))} layers and can be cut only "
                f"{rule.description}{'; a number of blocks cuts the longest level only' if several else ''}; ask for "
                f"{max_blocks} at most{', or give a list of sizes' if several else ''}"
            )
        start = level_ends[longest] - layers[longest]
        pieces = accumulate(equal_sizes(len(inside) + 1, blocks - len(layers) + 1))
        return tuple(sorted({*level_ends, *(start + inside[end - 1] for end in list(pieces)[:-1])}))
    sizes, ends = list(blocks), tuple(accumulate(blocks))
    if sum(sizes) != level_ends[-1]:
        raise ValueError(
            f"blocks {sizes} hold {sum(sizes)} layers together, but the backbone has {level_ends[-1]}; "
            f"make them add up to {level_ends[-1]}"
        )
    starts = (0, *level_ends)
    allowed = {
        start + cut for start, count in zip(starts, layers, strict=False) for cut in rule.cuts_inside(count)
    }
    allowed |= set(level_ends)
    if min(sizes) < 1 or not set(ends) <= allowed:
        raise ValueError(
            f"blocks {sizes} end after {', '.join(map(str, ends))} layers, but '{name}' can be cut only "
            f"{rule.description}, with at least 1 layer in each block: after {', '.join(map(str, sorted(allowed)))} layers"
        )
    return ends


def equal_sizes(total: int, parts: int) -> tuple[int, ...]:
    """`total` items in `parts` parts as equal as possible, the first ones larger. Raises ValueError if parts < 1."""
    if parts < 1:
        raise ValueError(f"blocks is {parts}; at least 1 is needed")
    size, rest = divmod(total, parts)
    return tuple(size + (index < rest) for index in range(parts))


def spans_between(level_ends: Sequence[int], start: int, end: int) -> tuple[Span, ...]:
    """The layers start..end - 1 of the whole model, level by level. level_ends: layers up to the end of each level."""
    return tuple(
        Span(level, max(start, first) - first, min(end, last) - first)
        for level, (first, last) in enumerate(pairwise((0, *level_ends)))
        if start < last and end > first
    )
