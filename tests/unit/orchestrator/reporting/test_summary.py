"""The final table and its rows."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from bim.orchestrator.evaluation.records import DepthReport, EvaluationResult
from bim.orchestrator.reporting.summary import (
    COLUMNS,
    Row,
    improvements_over_random,
    render_table,
    summary_rows,
    write_summary,
)
from tests.snapshots import assert_snapshot

RAW = {"knn_top1": 0.98, "knn_top1_se": 0.0074, "linear_top1": 0.966, "linear_top1_se": 0.0096}


def report(
    depth: int, knn: float | None, linear: float | None, timed: bool = True, rank: float | None = None
) -> DepthReport:
    return DepthReport(
        depth=depth,
        params=115_000 * depth,
        gflops=0.0123 * depth,
        latency_b1_ms=0.81 * depth if timed else None,
        latency_b64_ms=10.2 * depth if timed else None,
        knn_top1=knn,
        knn_top1_se=None if knn is None else 0.0149,
        linear_top1=linear,
        linear_top1_se=None if linear is None else 0.0134,
        n_test=0 if knn is None else 360,
        image_size=(32, 32),
        device="CPU, 2 threads" if timed else "",
        rankme=rank,
        n_ranked=0 if rank is None else 1234,
    )


TRAINED = (report(2, 0.912, 0.93), report(4, 0.92, 1.0))
RANDOM = (report(2, 0.712, 0.8, timed=False), report(4, 0.72, 0.82, timed=False))
MAE = [report(2, 0.9, 0.92), report(4, 0.91, 0.94)]
RANKED = (report(2, None, None, rank=31.26), report(4, None, None, rank=104.0))
RANDOM_RANKED = (
    report(2, None, None, timed=False, rank=7.0),
    report(4, None, None, timed=False, rank=8.04),
)
EVALUATION = EvaluationResult(TRAINED, RANDOM, RAW)


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("default", render_table(EVALUATION)),
        ("baseline", render_table(EVALUATION, MAE)),
        ("rankme", render_table(EvaluationResult(RANKED, RANDOM_RANKED))),
        ("rankme_without_references", render_table(EvaluationResult(RANKED))),
        ("without_labels", render_table(EvaluationResult((report(2, None, None),)))),
        ("without_references", render_table(EvaluationResult((report(2, 0.912, 0.93, timed=False),)))),
    ],
)
def test_the_table_reads_like_its_snapshot(name: str, table: str) -> None:
    assert_snapshot(f"summary_{name}", table)


def test_large_models_and_perfect_scores_fit_in_100_columns() -> None:
    large = tuple(
        DepthReport(
            d, 304_300_000, 123.4 * d, 123.4, 7890.0, 0.999, 1.0, 0.0213, 0.0, 400, (224, 224), "NVIDIA H200"
        )
        for d in (12, 24)
    )
    assert max(map(len, render_table(EvaluationResult(large, large, RAW), large).splitlines())) <= 100


def test_rows_hold_what_was_measured_and_leave_the_rest_empty(tmp_path: Path) -> None:
    rows = summary_rows(EVALUATION, MAE)
    assert [(row["weights"], row["depth"]) for row in rows] == [
        ("trained", 2), ("trained", 4), ("mae", 2), ("mae", 4), ("random", 2), ("random", 4), ("raw pixels", None),
    ]  # fmt: skip
    assert all(tuple(row) == COLUMNS for row in rows)
    assert rows[0]["params"] == 230_000
    assert rows[4]["latency_b1_ms"] is None
    assert rows[6] == dict.fromkeys(COLUMNS) | {"weights": "raw pixels"} | RAW
    assert [row["rankme"] for row in summary_rows(EvaluationResult(RANKED, RANDOM_RANKED))] == [
        31.26,
        104.0,
        7.0,
        8.04,
    ]

    as_json, as_csv = write_summary(rows, tmp_path / "new")
    assert json.loads(as_json.read_text()) == rows
    with as_csv.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert read[0]["knn_top1"] == "0.912"
    assert read[6]["depth"] == ""
    assert sorted(path.name for path in as_csv.parent.iterdir()) == ["summary.csv", "summary.json"]


def test_improvements_over_random_are_means_over_runs_with_one_runs_error() -> None:
    def run(trained: float, random: float) -> list[Row]:
        both = {"knn_top1_se": 0.03, "linear_top1_se": 0.04}
        return [
            {"weights": "trained", "depth": 2, "knn_top1": trained, "linear_top1": trained, **both},
            {"weights": "random", "depth": 2, "knn_top1": random, "linear_top1": random, **both},
        ]

    knn, linear = improvements_over_random([run(0.9, 0.7), run(0.8, 0.7)])
    assert (knn.depth, knn.metric, linear.metric) == (2, "knn_top1", "linear_top1")
    assert knn.mean == pytest.approx(0.15)
    assert knn.min_difference == pytest.approx(0.1)
    assert knn.error == pytest.approx((2 * 0.03**2) ** 0.5)


def test_a_run_without_scores_is_refused_by_name() -> None:
    rows: list[Row] = [{"weights": "trained", "depth": 2, "knn_top1": None}]
    with pytest.raises(ValueError, match="no knn_top1 of depth 2"):
        improvements_over_random([rows])
