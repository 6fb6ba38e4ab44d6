"""The final table, to the letter, and its rows."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from bim.orchestrator.evaluation.records import DepthReport
from bim.orchestrator.reporting.summary import (
    COLUMNS,
    Row,
    improvements_over_random,
    render_table,
    summary_rows,
    write_summary,
)
from bim.orchestrator.text import accuracy_text, params_text, three_digits

RAW = {"knn_top1": 0.98, "knn_top1_se": 0.0074, "linear_top1": 0.966, "linear_top1_se": 0.0096}


def report(
    depth: int, knn: float | None, linear: float | None, timed: bool = True, rank: float | None = None
) -> DepthReport:
    return DepthReport(
        depth=depth,
        params=115_000 * depth,
        gflops=0.0123 * depth,
        latency_ms_b1=0.81 * depth if timed else None,
        latency_ms_b64=10.2 * depth if timed else None,
        knn_top1=knn,
        knn_se=None if knn is None else 0.0149,
        probe_top1=linear,
        probe_se=None if linear is None else 0.0134,
        n_test=0 if knn is None else 360,
        image_size=(32, 32),
        device="CPU, 2 threads" if timed else "",
        rankme=rank,
        n_ranked=0 if rank is None else 1234,
    )


TRAINED = [report(2, 0.912, 0.93), report(4, 0.92, 1.0)]
RANDOM = [report(2, 0.712, 0.8, timed=False), report(4, 0.72, 0.82, timed=False)]
MAE = [report(2, 0.9, 0.92), report(4, 0.91, 0.94)]


def test_the_table_of_the_default_run_reads_so() -> None:
    assert render_table(TRAINED, RANDOM, RAW) == (
        "                                       kNN top-1 %         linear top-1 %\n"
        "depth   params  GFLOPs  ms b1  ms b64   trained    random   trained    random\n"
        "    2  0.230 M  0.0246   1.62    20.4  91.2±1.5  71.2±1.5  93.0±1.3  80.0±1.3\n"
        "    4  0.460 M  0.0492   3.24    40.8  92.0±1.5  72.0±1.5   100±1.3  82.0±1.3\n"
        "raw pixels                             98.0±0.7            96.6±1.0\n"
        "\n"
        "±       one standard error on 360 test images\n"
        "random  the same depth before training\n"
        "GFLOPs  2 x multiply-accumulates, one image of 32 x 32 pixels\n"
        "ms      median time of a batch of 1 and of 64 on CPU, 2 threads"
    )


def test_the_baseline_stands_beside_the_trained_depths() -> None:
    lines = render_table(TRAINED, RANDOM, RAW, MAE).splitlines()
    assert lines[:5] == [
        "                                       kNN top-1 %                   linear top-1 %",
        "depth   params  GFLOPs  ms b1  ms b64   trained       MAE    random   trained       MAE    random",
        "    2  0.230 M  0.0246   1.62    20.4  91.2±1.5  90.0±1.5  71.2±1.5  93.0±1.3  92.0±1.3  80.0±1.3",
        "    4  0.460 M  0.0492   3.24    40.8  92.0±1.5  91.0±1.5  72.0±1.5   100±1.3  94.0±1.3  82.0±1.3",
        "raw pixels                             98.0±0.7                      96.6±1.0",
    ]
    assert "MAE     the end-to-end baseline, cut to the same depth" in lines


def test_without_labels_the_rank_takes_the_place_of_accuracies_and_it_is_said_why() -> None:
    trained = [report(2, None, None, rank=31.26), report(4, None, None, rank=104.0)]
    random = [report(2, None, None, timed=False, rank=7.0), report(4, None, None, timed=False, rank=8.04)]
    assert render_table(trained, random) == (
        "                                       RankMe\n"
        "depth   params  GFLOPs  ms b1  ms b64  trained  random\n"
        "    2  0.230 M  0.0246   1.62    20.4     31.3     7.0\n"
        "    4  0.460 M  0.0492   3.24    40.8    104.0     8.0\n"
        "\n"
        "RankMe  effective rank of the embeddings of 1,234 training images; more is better, at most the embedding's width\n"
        "random  the same depth before training\n"
        "GFLOPs  2 x multiply-accumulates, one image of 32 x 32 pixels\n"
        "ms      median time of a batch of 1 and of 64 on CPU, 2 threads\n"
        "No accuracy: the data has no labels."
    )
    alone = render_table(trained).splitlines()
    assert alone[0] == "depth   params  GFLOPs  ms b1  ms b64  RankMe"
    with_mae = render_table(trained, random, baseline_reports=random).splitlines()
    assert with_mae[1].endswith("trained  MAE  random")
    assert "MAE     the end-to-end baseline, cut to the same depth" in with_mae
    assert [row["rankme"] for row in summary_rows(trained, random)] == [31.26, 104.0, 7.0, 8.04]


def test_without_any_score_only_costs_are_shown() -> None:
    table = render_table([report(2, None, None)])
    assert table.splitlines()[0] == "depth   params  GFLOPs  ms b1  ms b64"
    assert "RankMe" not in table
    assert table.endswith("No accuracy: the data has no labels.")


def test_without_references_the_metric_is_the_column() -> None:
    assert render_table([report(2, 0.912, 0.93, timed=False)]).splitlines()[:2] == [
        "depth   params  GFLOPs  kNN top-1 %  linear top-1 %",
        "    2  0.230 M  0.0246     91.2±1.5        93.0±1.3",
    ]


def test_large_models_and_perfect_scores_fit_in_100_columns() -> None:
    large = [
        DepthReport(
            d, 304_300_000, 123.4 * d, 123.4, 7890.0, 0.999, 1.0, 0.0213, 0.0, 400, (224, 224), "NVIDIA H200"
        )
        for d in (12, 24)
    ]
    assert max(map(len, render_table(large, large, RAW, large).splitlines())) <= 100


def test_rows_say_what_was_measured_and_leave_the_rest_empty(tmp_path: Path) -> None:
    rows = summary_rows(TRAINED, RANDOM, RAW, MAE)
    assert [(row["weights"], row["depth"]) for row in rows] == [
        ("trained", 2), ("trained", 4), ("mae", 2), ("mae", 4), ("random", 2), ("random", 4), ("raw pixels", None),
    ]  # fmt: skip
    assert all(tuple(row) == COLUMNS for row in rows)
    assert rows[0]["params"] == 230_000
    assert rows[4]["latency_b1_ms"] is None
    assert rows[6] == dict.fromkeys(COLUMNS) | {"weights": "raw pixels"} | RAW

    as_json, as_csv = write_summary(rows, tmp_path / "new")
    assert json.loads(as_json.read_text()) == rows
    with as_csv.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert read[0]["knn_top1"] == "0.912"
    assert read[6]["depth"] == ""
    assert sorted(path.name for path in as_csv.parent.iterdir()) == ["summary.csv", "summary.json"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.00001234, "0.000012"), (0.5, "0.500"), (9.999, "10.0"), (99.96, "100"), (1234.5, "1234")],
)  # fmt: skip
def test_numbers_have_three_digits_and_no_exponent(value: float, text: str) -> None:
    assert three_digits(value) == text


@pytest.mark.parametrize(
    ("params", "text"),
    [(12_345, "12.3 k"), (230_000, "0.230 M"), (5_500_000, "5.50 M"), (304_300_000, "304 M")],
)
def test_parameters_are_told_in_thousands_or_millions(params: int, text: str) -> None:
    assert params_text(params) == text


def test_an_accuracy_that_was_not_measured_is_a_dash() -> None:
    assert accuracy_text({}, "knn_top1") == "-"


def test_leads_over_random_are_means_over_runs_with_one_runs_error() -> None:
    def run(trained: float, random: float) -> list[Row]:
        both = {"knn_top1_se": 0.03, "linear_top1_se": 0.04}
        return [
            {"weights": "trained", "depth": 2, "knn_top1": trained, "linear_top1": trained, **both},
            {"weights": "random", "depth": 2, "knn_top1": random, "linear_top1": random, **both},
        ]

    knn, linear = improvements_over_random([run(0.9, 0.7), run(0.8, 0.7)])
    assert (knn.depth, knn.score, linear.score) == (2, "knn_top1", "linear_top1")
    assert knn.mean == pytest.approx(0.15)
    assert knn.least == pytest.approx(0.1)
    assert knn.error == pytest.approx((2 * 0.03**2) ** 0.5)


def test_a_run_without_scores_is_refused_by_name() -> None:
    rows: list[Row] = [{"weights": "trained", "depth": 2, "knn_top1": None}]
    with pytest.raises(ValueError, match="no knn_top1 of depth 2"):
        improvements_over_random([rows])
