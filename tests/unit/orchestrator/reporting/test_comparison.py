from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from bim.orchestrator.reporting.comparison import (
    ALL_COLUMNS,
    MemberResult,
    comparison_rows,
    comparison_table,
    cost_key,
    pareto_depths,
    quality_key,
    read_rows,
)
from bim.orchestrator.reporting.figures.backbones import comparison_figure
from bim.orchestrator.reporting.summary import COLUMNS, Row, write_summary
from tests.snapshots import assert_snapshot


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


def test_the_front_holds_the_pareto_optimal_depths() -> None:
    assert pareto_depths([VIT, SWIN]) == [("vit_tiny_patch16_224", 2), ("small", 2)]


def test_latency_is_the_cost_if_all_were_timed_and_gflops_otherwise() -> None:
    untimed = MemberResult("b", "b", (32, 32), (row("trained", 2, None, 0.9, gflops=0.5),))
    assert cost_key([VIT, SWIN]) == "latency_b1_ms"
    assert cost_key([VIT, untimed]) == "gflops"
    assert pareto_depths([VIT, untimed])[0] == ("b", 2)
    assert "(GFLOPs)" in comparison_table([VIT, untimed], 100)


UNLABELED = [
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


def test_without_labels_rankme_decides_which_depths_are_on_the_front() -> None:
    assert quality_key(UNLABELED) == "rankme"
    assert quality_key([VIT, SWIN]) == "knn_top1"
    assert pareto_depths(UNLABELED) == [("vit", 2), ("swin", 4)]
    assert [r["pareto_front"] for r in comparison_rows(UNLABELED)] == [1, 0, None, 1]


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("labels", comparison_table([VIT, BROKEN, SWIN], 359, "CPU, 2 threads")),
        ("rankme", comparison_table(UNLABELED, 0, "CPU, 2 threads")),
        (
            "costs_alone",
            comparison_table([MemberResult("a", "a", (16, 16), (row("trained", 2, 1.0, None),))]),
        ),
        ("failures_alone", comparison_table([BROKEN])),
    ],
)
def test_the_table_reads_like_its_snapshot(name: str, table: str) -> None:
    assert_snapshot(f"comparison_{name}", table)
    assert max(map(len, table.splitlines())) <= 100


def test_without_labels_the_picture_is_one_panel_of_ranks() -> None:
    figure = comparison_figure([*UNLABELED, BROKEN])
    assert figure is not None
    (axes,) = figure.axes
    assert (axes.get_title(), axes.get_ylabel()) == (
        "RankMe",
        "effective rank of the embeddings",
    )
    assert list(axes.containers[0].lines[0].get_ydata()) == [31.26, 29.0]  # type: ignore[attr-defined]


def test_rows_without_a_column_for_rankme_are_still_compared() -> None:
    old = [{key: value for key, value in values.items() if key != "rankme"} for values in VIT.rows]
    before = MemberResult("vit_tiny_patch16_224", "vit_tiny_patch16_224", (32, 32), tuple(old))
    assert comparison_rows([before, SWIN]) == comparison_rows([VIT, SWIN])
    assert comparison_table([before, SWIN], 359) == comparison_table([VIT, SWIN], 359)
    assert comparison_figure([before]) is not None
    unscored = [row | dict.fromkeys(("knn_top1", "linear_top1")) for row in old]
    bare = MemberResult("old", "old", (32, 32), tuple(unscored))
    assert pareto_depths([bare, *UNLABELED]) == pareto_depths(UNLABELED)
    assert "31.3" in comparison_table([bare, *UNLABELED])
    figure = comparison_figure([bare, *UNLABELED])
    assert figure is not None
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["vit", "swin", "Pareto front"]


def test_without_any_score_there_is_no_picture() -> None:
    assert comparison_figure([MemberResult("a", "a", (16, 16), (row("trained", 2, 1.0, None),))]) is None


def test_rows_for_other_programs_name_backbone_status_front_and_cause(tmp_path: Path) -> None:
    rows = comparison_rows([VIT, BROKEN, SWIN])
    assert all(tuple(values) == ALL_COLUMNS for values in rows)
    assert [(r["backbone"], r["status"], r["depth"], r["pareto_front"]) for r in rows] == [
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


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"3", b"{}", b"[1]", b"[{}]", b'[{"weights": "trained"}]', b"\xff\xfe", b"[" * 100_000,
     b'[{"weights": "trained", "depth": 2, "latency_b1_ms": "fast"}]', None],
)  # fmt: skip
def test_a_summary_of_other_content_is_one_kind_of_error(content: bytes | None, tmp_path: Path) -> None:
    if content is None:
        (tmp_path / "summary.json").mkdir()
    else:
        (tmp_path / "summary.json").write_bytes(content)
    with pytest.raises((OSError, ValueError)):
        read_rows(tmp_path)


def test_the_picture_has_a_series_for_every_backbone_that_finished_and_the_front() -> None:
    figure = comparison_figure([VIT, BROKEN, SWIN], "CPU, 2 threads")
    assert figure is not None
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "vit_tiny_patch16_224",
        "small",
        "Pareto front",
    ]
