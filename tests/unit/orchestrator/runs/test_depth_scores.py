"""Scores of a run: kept in a file, the best of them, and when they end a training."""

from __future__ import annotations

from pathlib import Path

import pytest

from bim.orchestrator.config.cli import load_settings
from bim.orchestrator.data.phases import constant
from bim.orchestrator.runs.depth_scores import (
    MIN_IMAGES,
    DepthScores,
    best_scores,
    ends_early,
    images_of_a_score,
    num_scores,
    read_scores,
    write_scores,
)
from bim.orchestrator.runs.resolve import SCORES_PER_RUN, spread_scores


def scores(*values: float) -> list[DepthScores]:
    return [
        DepthScores(10 * number, number, "knn_top1", {2: value, 4: value}, 100, 1.0)
        for number, value in enumerate(values, start=1)
    ]


def test_what_was_written_is_read(tmp_path: Path) -> None:
    assert read_scores(tmp_path) == []
    write_scores(tmp_path, scores(0.25, 0.5))
    assert read_scores(tmp_path) == scores(0.25, 0.5)


@pytest.mark.parametrize("text", ["", "{}", "[1]", "[{}]", '[{"step": null}]', "null", "\x00"])
def test_a_damaged_file_is_no_score(tmp_path: Path, text: str) -> None:
    (tmp_path / "scores.json").write_text(text)
    assert read_scores(tmp_path) == []


@pytest.mark.parametrize(
    ("values", "patience", "best", "ends"),
    [
        ([], 1, None, False),
        ([0.5], 1, 1, False),
        ([0.5, 0.5], 1, 1, True),
        ([0.5, 0.4, 0.6], 2, 3, False),
        ([0.5, 0.4, 0.3], 2, 1, True),
        ([0.5, 0.4, 0.3, 0.9], 2, 1, True),
        ([0.5, 0.4, 0.3, 0.9], None, 4, False),
    ],
)
def test_the_first_of_the_best_counts_until_patience_is_over(
    values: list[float], patience: int | None, best: int | None, ends: bool
) -> None:
    found = best_scores(scores(*values), patience)
    assert (None if found is None else found.epoch) == best
    assert ends_early(scores(*values), patience) == ends


@pytest.mark.parametrize(
    ("epochs", "every", "count"),
    [(100, None, 9), (101, None, 10), (5, None, 4), (1, None, 0), (10, 4, 2), (10, 5, 1), (10, 0, 0)],
)
def test_a_run_is_scored_ten_times_unless_told_otherwise(epochs: int, every: int | None, count: int) -> None:
    argv = ["--schedule.epochs", str(epochs), "--schedule.warmup_epochs", "0"]
    settings = load_settings([*argv, "--evaluation.every_epochs", "null" if every is None else str(every)])
    assert num_scores(settings) == count


@pytest.mark.parametrize("epochs", [*range(2, 60), 99, 109, 199, 800])
def test_there_are_ten_scores_before_the_end_at_most_and_one_at_least(epochs: int) -> None:
    every = spread_scores(epochs, SCORES_PER_RUN)
    scores = sum(epoch % every == 0 for epoch in range(1, epochs))
    assert 1 <= scores <= 10
    assert every == 1 or (epochs - 1) // (every - 1) > 10 or scores >= 5


def test_scores_take_a_twentieth_of_the_images_that_are_trained_on() -> None:
    settings = load_settings(["--schedule.epochs", "100", "--evaluation.every_epochs", "null"])
    assert images_of_a_score(settings, constant(100, 64), 100 * 100) == 100 * 100 * 64 * 0.05 // 9
    assert images_of_a_score(settings, constant(1, 64), 100) == MIN_IMAGES
