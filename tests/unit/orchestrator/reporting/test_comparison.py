from __future__ import annotations

import csv
import json
from pathlib import Path

from bim.orchestrator.reporting.comparison import (
    ALL_COLUMNS,
    MemberResult,
    comparison_rows,
    comparison_table,
    cost_of,
    front,
    read_rows,
    score_of,
)
from bim.orchestrator.reporting.figures.backbones import comparison_figure
from bim.orchestrator.reporting.summary import COLUMNS, Row, write_summary


def row(
    weights: str,
    depth: int,
    ms: float | None,
    knn: float | None,
    gflops: float = 1.0,
    rank: float | None = None,
) -> Row:
    values: Row = dict.fromkeys(COLUMNS)
    scores: Row = {} if knn is None else dict.fromkeys(("knn_top1", "linear_top1"), knn)
    scores |= {} if knn is None else dict.fromkeys(("knn_top1_se", "linear_top1_se"), 0.02)
    own: Row = {
        "weights": weights,
        "depth": depth,
        "params": 2_000_000,
        "gflops": gflops,
        "latency_b1_ms": ms,
        "rankme": rank,
    }
    return values | own | scores


VIT = MemberResult(
    "vit_tiny_patch16_224",
    "vit_tiny_patch16_224",
    (32, 32),
    (row("trained", 2, 1.0, 0.8), row("trained", 4, 3.0, 0.85), row("random", 2, None, 0.5)),
)
SWIN = MemberResult(
    "small",
    "swin_tiny_patch4_window7_224",
    (64, 64),
    (row("trained", 2, 2.0, 0.9), row("trained", 4, 4.0, 0.9)),
)
BROKEN = MemberResult("wide", "vit_base_patch16_224", (32, 32), failed="the loss of block 0 is not finite")


def test_the_front_holds_what_nothing_as_cheap_is_as_good_as() -> None:
    assert front([VIT, SWIN]) == [("vit_tiny_patch16_224", 2), ("small", 2)]


def test_latency_is_the_cost_where_all_were_timed_and_arithmetic_otherwise() -> None:
    untimed = MemberResult("b", "b", (32, 32), (row("trained", 2, None, 0.9, gflops=0.5),))
    assert cost_of([VIT, SWIN]) == "latency_b1_ms"
    assert cost_of([VIT, untimed]) == "gflops"
    assert front([VIT, untimed])[0] == ("b", 2)
    assert "(GFLOPs)" in comparison_table([VIT, untimed], 100)


def test_the_table_has_every_backbone_below_its_name_and_says_who_failed() -> None:
    lines = comparison_table([VIT, BROKEN, SWIN], 359, "CPU, 2 threads").splitlines()
    assert lines[1].split()[:2] == ["depth", "params"]
    assert lines[2] == "vit_tiny_patch16_224, 32 x 32 px"
    assert lines[3].startswith("*      2")
    assert "50.0±2.0" in lines[3]
    assert lines[4].startswith("       4")
    assert lines[5] == "small, swin_tiny_patch4_window7_224, 64 x 64 px"
    assert lines[8] == "wide  FAILED: the loss of block 0 is not finite"
    assert "one standard error on 359 test images" in lines[11]
    assert lines[-1].endswith("on CPU, 2 threads")


UNLABELLED = [
    MemberResult(
        "vit",
        "vit_tiny_patch16_224",
        (32, 32),
        (
            row("trained", 2, 1.0, None, rank=31.26),
            row("trained", 4, 3.0, None, rank=29.0),
            row("random", 2, None, None, rank=7.0),
        ),
    ),
    MemberResult("swin", "swin", (32, 32), (row("trained", 4, 2.0, None, rank=64.04),)),
]


def test_without_labels_the_rank_decides_who_is_on_the_front() -> None:
    assert score_of(UNLABELLED) == "rankme"
    assert score_of([VIT, SWIN]) == "knn_top1"
    assert front(UNLABELLED) == [("vit", 2), ("swin", 4)]
    assert [r["on_front"] for r in comparison_rows(UNLABELLED)] == [1, 0, None, 1]
    lines = comparison_table(UNLABELLED, 0, "CPU, 2 threads").splitlines()
    assert max(map(len, lines)) <= 125
    assert lines[0].strip() == "RankMe"
    assert lines[1].split() == ["depth", "params", "GFLOPs", "ms", "b1", "trained", "random"]
    assert lines[3].split() == ["*", "2", "2.00", "M", "1.00", "1.00", "31.3", "7.0"]
    assert lines[4].split()[-2:] == ["29.0", "-"]
    assert "*       nothing else here has as good a RankMe at as low a cost (ms b1)" in lines
    assert "random  the same depth before training" in lines
    assert not any(line.startswith("±") for line in lines)
    assert any(line.startswith("RankMe  effective rank") and "different widths" in line for line in lines)
    assert lines[-1] == "No accuracy: the data has no labels."


def test_without_labels_the_picture_is_one_panel_of_ranks() -> None:
    figure = comparison_figure([*UNLABELLED, BROKEN])
    assert figure is not None
    (axes,) = figure.axes
    assert (axes.get_title(), axes.get_ylabel()) == (
        "RankMe",
        "effective rank of the embeddings",
    )
    assert list(axes.containers[0].lines[0].get_ydata()) == [31.26, 29.0]  # type: ignore[attr-defined]


def test_rows_of_before_there_was_a_rank_are_still_compared() -> None:
    old = [{key: value for key, value in found.items() if key != "rankme"} for found in VIT.rows]
    before = MemberResult("vit_tiny_patch16_224", "vit_tiny_patch16_224", (32, 32), tuple(old))
    assert comparison_rows([before, SWIN]) == comparison_rows([VIT, SWIN])
    assert comparison_table([before, SWIN], 359) == comparison_table([VIT, SWIN], 359)
    assert comparison_figure([before]) is not None
    unscored = [row | dict.fromkeys(("knn_top1", "linear_top1")) for row in old]
    bare = MemberResult("old", "old", (32, 32), tuple(unscored))
    assert front([bare, *UNLABELLED]) == front(UNLABELLED)
    assert "31.3" in comparison_table([bare, *UNLABELLED])
    figure = comparison_figure([bare, *UNLABELLED])
    assert figure is not None
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["vit", "swin", "front"]


def test_a_table_without_any_score_has_costs_alone() -> None:
    bare = MemberResult("a", "a", (16, 16), (row("trained", 2, 1.0, None),))
    text = comparison_table([bare])
    assert "top-1" not in text
    assert text.endswith("No accuracy: the data has no labels.")
    assert comparison_figure([bare]) is None


def test_a_table_of_failures_alone_is_their_causes() -> None:
    assert comparison_table([BROKEN]) == "wide  FAILED: the loss of block 0 is not finite"


def test_rows_for_other_programs_name_backbone_status_front_and_cause(tmp_path: Path) -> None:
    rows = comparison_rows([VIT, BROKEN, SWIN])
    assert all(tuple(found) == ALL_COLUMNS for found in rows)
    assert [(r["backbone"], r["status"], r["depth"], r["on_front"]) for r in rows] == [
        ("vit_tiny_patch16_224", "finished", 2, 1),
        ("vit_tiny_patch16_224", "finished", 4, 0),
        ("vit_tiny_patch16_224", "finished", 2, None),
        ("wide", "failed", None, None),
        ("small", "finished", 2, 1),
        ("small", "finished", 4, 0),
    ]
    assert rows[3]["cause"] == "the loss of block 0 is not finite"
    as_json, as_csv = write_summary(rows, tmp_path, ALL_COLUMNS)
    assert json.loads(as_json.read_text()) == rows
    assert len(list(csv.DictReader(as_csv.open()))) == len(rows)


def test_the_rows_of_one_backbone_are_read_from_its_own_summary(tmp_path: Path) -> None:
    write_summary(VIT.rows, tmp_path)
    assert read_rows(tmp_path) == VIT.rows


def test_the_picture_has_a_series_for_every_backbone_that_finished_and_the_front() -> None:
    figure = comparison_figure([VIT, BROKEN, SWIN], "CPU, 2 threads")
    assert figure is not None
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["vit_tiny_patch16_224", "small", "front"]
