"""The renderer of tables."""

from __future__ import annotations

from bim.orchestrator.tables import Key, note_lines, render

ROWS: list[dict[Key, str]] = [
    {"depth": "2", "size": "1.00 M", ("kNN", "trained"): "91.2", ("kNN", "random"): "-", ("linear", "trained"): "-"},
    {"depth": "10", "size": "-", ("kNN", "trained"): "9.2", ("kNN", "random"): "1.0"},
    {"depth": "raw pixels", ("kNN", "trained"): "98.0"},
]  # fmt: skip


def test_columns_are_aligned_below_their_groups_and_empty_ones_left_out() -> None:
    assert render(ROWS).splitlines() == [
        "               kNN",
        "depth    size  trained  random",
        "    2  1.00 M     91.2       -",
        "   10       -      9.2     1.0",
        "raw pixels        98.0",
    ]


def test_text_is_aligned_left() -> None:
    rows = [{"model": "depth 6", "status": "ok"}, {"model": "depth 12", "status": "failed"}]
    assert render(rows, align="left").splitlines() == ["model     status", "depth 6   ok", "depth 12  failed"]
    assert render(rows, align="label").splitlines() == [
        "model     status",
        "depth 6       ok",
        "depth 12  failed",
    ]


def test_markdown_has_a_cell_for_every_column() -> None:
    assert render(ROWS[1:], "markdown").splitlines() == [
        "| depth | trained | random |",
        "| ---: | ---: | ---: |",
        "| 10 | 9.2 | 1.0 |",
        "| raw pixels | 98.0 |  |",
    ]


def test_terms_and_their_meaning_are_two_columns() -> None:
    assert note_lines([("±", "one"), ("GFLOPs", "two")]) == ["±       one", "GFLOPs  two"]
