from __future__ import annotations

from typing import Any

import pytest

from bim.models.backbones.cuts import Span, cut, spans_between

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
    assert cut("swin", layers, blocks) == ends
    sizes = [end - start for start, end in zip((0, *ends), ends, strict=False)]
    assert cut("swin", layers, sizes) == ends


@pytest.mark.parametrize(
    ("blocks", "reason"),
    [
        (
            7,
            r"a number of blocks cuts 'swin' into 6 at most.* 2, 2, 6, 2 layers.* longest after every second layer",
        ),
        (0, "at least 1"),
        ([2, 2, 3, 3, 2], r"end after 2, 4, 7, 10, 12 layers.* after 2, 4, 6, 8, 10, 12 layers"),
        ([1, 11], "after an even number of its layers"),
        ([4, 4], "the last of which must be reached"),
        ([4, 0, 8], "can be cut only where"),
        ([], "end after no layers"),
    ],
)
def test_other_cuts_are_refused_with_those_that_are_allowed(blocks: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        cut("swin", SWIN_T, blocks)


def test_a_list_may_cut_every_level_where_a_number_cuts_the_longest_only() -> None:
    layers = (4, 4, 6, 2)
    with pytest.raises(ValueError, match=r"into 6 at most.*; a list of sizes may cut every level"):
        cut("swin", layers, 7)
    assert cut("swin", layers, 6) == (4, 8, 10, 12, 14, 16)
    assert cut("swin", layers, [2] * 8) == (2, 4, 6, 8, 10, 12, 14, 16)


def test_layers_are_found_in_their_levels() -> None:
    ends = (2, 4, 10, 12)
    assert spans_between(ends, 0, 12) == (Span(0, 0, 2), Span(1, 0, 2), Span(2, 0, 6), Span(3, 0, 2))
    assert spans_between(ends, 3, 6) == (Span(1, 1, 2), Span(2, 0, 2))
    assert spans_between(ends, 6, 10) == (Span(2, 2, 6),)
