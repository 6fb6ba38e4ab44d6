from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bim.models.backbones.cuts import (
    AFTER_LAYER_PAIRS,
    AFTER_LAYERS,
    AFTER_LEVELS,
    Span,
    block_boundaries,
    equal_sizes,
    spans_between,
)

SWIN_T, SWIN_B = (2, 2, 6, 2), (2, 2, 18, 2)


@pytest.mark.parametrize(
    ("layers", "blocks", "ends"),
    [
        (SWIN_T, 1, (12,)),
        (SWIN_T, 2, (4, 12)),
        (SWIN_T, 4, (2, 4, 10, 12)),
        (SWIN_T, 5, (2, 4, 8, 10, 12)),
        (SWIN_T, 6, (2, 4, 6, 8, 10, 12)),
        (SWIN_B, 6, (2, 4, 10, 16, 22, 24)),
        (SWIN_B, 5, (2, 4, 14, 22, 24)),
        ((2, 3), 3, (2, 4, 5)),
        (SWIN_T, [2, 2, 4, 2, 2], (2, 4, 8, 10, 12)),
        (SWIN_T, [8, 4], (8, 12)),
        (SWIN_T, [12], (12,)),
    ],
)
def test_cuts_lie_after_levels_and_inside_the_longest_after_an_even_layer(
    layers: tuple[int, ...], blocks: Any, ends: tuple[int, ...]
) -> None:
    assert block_boundaries("swin", layers, blocks, AFTER_LAYER_PAIRS) == ends
    sizes = [end - start for start, end in zip((0, *ends), ends, strict=False)]
    assert block_boundaries("swin", layers, sizes, AFTER_LAYER_PAIRS) == ends


@pytest.mark.parametrize(
    ("blocks", "reason"),
    [
        (
            7,
            r"'swin' has 2 \+ 2 \+ 6 \+ 2 layers.* the longest level only; ask for 6 at most, or give a list",
        ),
        (0, "at least 1"),
        ([2, 2, 3, 3, 2], r"end after 2, 4, 7, 10, 12 layers.* after 2, 4, 6, 8, 10, 12 layers"),
        ([1, 11], "after an even number of its layers"),
        ([4, 4], "hold 8 layers together, but the backbone has 12; make them add up to 12"),
        ([4, 0, 8], "at least 1 layer in each block"),
        ([], "hold 0 layers"),
    ],
)
def test_other_cuts_are_refused_with_those_that_are_allowed(blocks: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        block_boundaries("swin", SWIN_T, blocks, AFTER_LAYER_PAIRS)


def test_a_list_may_cut_every_level_where_a_number_cuts_the_longest_only() -> None:
    layers = (4, 4, 6, 2)
    with pytest.raises(ValueError, match="ask for 6 at most, or give a list of sizes"):
        block_boundaries("swin", layers, 7, AFTER_LAYER_PAIRS)
    assert block_boundaries("swin", layers, 6, AFTER_LAYER_PAIRS) == (4, 8, 10, 12, 14, 16)
    assert block_boundaries("swin", layers, [2] * 8, AFTER_LAYER_PAIRS) == (2, 4, 6, 8, 10, 12, 14, 16)


def test_layers_are_found_in_their_levels() -> None:
    ends = (2, 4, 10, 12)
    assert spans_between(ends, 0, 12) == (Span(0, 0, 2), Span(1, 0, 2), Span(2, 0, 6), Span(3, 0, 2))
    assert spans_between(ends, 3, 6) == (Span(1, 1, 2), Span(2, 0, 2))
    assert spans_between(ends, 6, 10) == (Span(2, 2, 6),)


@given(st.integers(1, 40), st.integers(1, 40))
def test_equal_sizes_differ_by_at_most_one(total: int, parts: int) -> None:
    sizes = equal_sizes(total, parts)
    assert (sum(sizes), len(sizes)) == (total, parts)
    assert max(sizes) - min(sizes) <= 1


def test_a_backbone_of_one_level_is_cut_after_every_layer_into_equal_blocks() -> None:
    assert block_boundaries("vit", [12], 5, AFTER_LAYERS) == (3, 6, 8, 10, 12)
    assert block_boundaries("vit", [12], [3, 3, 4, 2], AFTER_LAYERS) == (3, 6, 10, 12)


@pytest.mark.parametrize(
    ("blocks", "reason"),
    [
        (0, "at least 1"),
        (13, "12 layers and can be cut only after every layer; ask for 12 at most"),
        ([3, 3, 3], "hold 9"),
        ([12, 0], "at least 1 layer"),
        ([], "hold 0"),
    ],
)
def test_blocks_that_do_not_fit_the_depth_are_refused(blocks: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        block_boundaries("vit", [12], blocks, AFTER_LAYERS)


def test_where_levels_cannot_be_cut_blocks_end_with_levels() -> None:
    assert block_boundaries("pvt", SWIN_T, 3, AFTER_LEVELS) == (4, 10, 12)
    assert block_boundaries("pvt", SWIN_T, [10, 2], AFTER_LEVELS) == (10, 12)
    with pytest.raises(ValueError, match="can be cut only where a level ends; ask for 4 at most"):
        block_boundaries("pvt", SWIN_T, 5, AFTER_LEVELS)
    with pytest.raises(ValueError, match=r"only where a level ends, .*: after 2, 4, 10, 12 layers"):
        block_boundaries("pvt", SWIN_T, [8, 4], AFTER_LEVELS)


def test_a_level_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="has a level without layers"):
        block_boundaries("vit", [0], 1, AFTER_LAYERS)
