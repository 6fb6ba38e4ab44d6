"""Ranking trials: only whole ones, at equal epochs, and the front of quality against cost."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from bim.orchestrator.search.record import FOLDER, TABLE, save_result
from bim.orchestrator.search.results import (
    SearchResult,
    Status,
    TrialRow,
    TrialScore,
    best_line,
    changes_of_best,
    note_rows,
    status_counts,
    table_rows,
)

BASELINE = {"mask.ratio": 0.75, "schedule.resolution": None}


def row(
    number: int, score: float | None, gflops: float = 1.0, status: Status = "finished", epoch: int = 4
) -> TrialRow:
    ratio = 0.75 if number == 0 else 0.5 + number / 100
    points = (
        ()
        if score is None
        else (TrialScore(2, score / 2, {2: score / 2}), TrialScore(epoch, score, {2: score}))
    )
    changes = {"mask.ratio": ratio, "schedule.resolution": None}
    return TrialRow(number, changes, status, "why", points, gflops, 100.0)


def result(*rows: TrialRow) -> SearchResult:
    return SearchResult("knn_top1", 100, 4, BASELINE, rows=rows)


def test_the_best_trial_has_the_highest_last_score() -> None:
    assert result(row(0, 0.5), row(1, 0.7), row(2, 0.6)).best.number == 1


def test_among_equals_the_baseline_is_the_best() -> None:
    found = result(row(0, 0.5), row(1, 0.5))
    assert found.best.number == 0
    assert changes_of_best(found) == {}
    assert best_line(found) == "best: trial 0, baseline config: kNN top-1 0.500 (standard error 0.050)"


def test_a_score_after_fewer_epochs_never_wins() -> None:
    found = result(row(0, 0.5), row(1, 0.9, status="stopped early", epoch=3), row(2, 0.4))
    assert found.best.number == 0
    assert [r.number for r in found.pareto_front] == [0]


def test_trials_without_a_score_do_not_count() -> None:
    found = result(row(0, 0.5), row(1, None, status="failed"), row(2, None, status="infeasible"))
    assert found.best.number == 0
    assert status_counts(found.rows) == "1 finished, 1 infeasible, 1 failed"
    with pytest.raises(ValueError, match="no trial of the search was trained to its end"):
        _ = result(row(0, 0.9, status="running")).best


def test_the_front_holds_what_no_other_trial_beats_in_score_and_cost() -> None:
    found = result(row(0, 0.5, 4.0), row(1, 0.6, 3.0), row(2, 0.4, 1.0), row(3, 0.55, 3.5), row(4, 0.4, 2.0))
    assert [r.number for r in found.pareto_front] == [2, 1]


def test_of_two_trials_at_the_same_cost_the_better_one_is_on_the_front() -> None:
    assert [r.number for r in result(row(0, 0.5, 1.0), row(1, 0.6, 1.0)).pareto_front] == [1]


def test_the_outcome_names_the_setting_the_score_the_baseline_and_the_standard_error() -> None:
    line = best_line(result(row(0, 0.5), row(1, 0.7)))
    assert line == "best: trial 1, mask.ratio 0.51: kNN top-1 0.700 (baseline 0.500, standard error 0.046)"


def test_a_score_of_the_same_epoch_is_replaced() -> None:
    curve = row(0, 0.5).with_score(TrialScore(2, 0.9, {2: 0.9})).curve
    assert [(point.epoch, point.score) for point in curve] == [(2, 0.9), (4, 0.5)]


def test_trials_are_compared_at_the_same_epoch() -> None:
    found = result(row(0, 0.5), row(1, 0.8, epoch=3), row(2, 0.6))
    assert found.scores_at(4) == {0: 0.5, 2: 0.6}
    best = found.best_at(4)
    assert best is not None
    assert best.number == 2
    assert found.best_at(1) is None


def test_the_table_lists_the_best_first_and_every_setting(tmp_path: Path) -> None:
    found = result(row(0, 0.5, 2.0), row(1, 0.7), row(2, 0.9, status="stopped early", epoch=3))
    save_result(tmp_path, found)
    rows = list(csv.DictReader((tmp_path / FOLDER / TABLE).open()))
    assert [line["trial"] for line in rows] == ["1", "0", "2"]
    assert rows[0]["best"] == "best"
    assert rows[0]["pareto_front"] == "pareto_front"
    assert [line["mask.ratio"] for line in rows] == ["0.51", "0.75", "0.52"]
    assert rows[0]["schedule.resolution"] == "null"
    assert [line["status"] for line in rows] == ["finished", "finished", "stopped early"]
    assert rows[0]["depth02"] == "0.7"
    assert len(table_rows(found)) == len(note_rows(found)) == 3


def test_a_rank_has_no_standard_error() -> None:
    found = SearchResult("rankme", 2048, 4, BASELINE, rows=(row(0, 20.0), row(1, 31.26)))
    assert best_line(found) == "best: trial 1, mask.ratio 0.51: RankMe 31.3 (baseline 20.0)"
