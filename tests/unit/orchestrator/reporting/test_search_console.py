"""The lines of a search."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from bim.orchestrator.reporting.search_console import SearchProgress, closing, opening
from bim.orchestrator.search.results import SearchResult, TrialRow, TrialScore
from bim.orchestrator.search.space import Choice, Range
from tests.snapshots import assert_snapshot

OWN = {"mask.ratio": 0.75, "optim.blr": 0.008}
EMPTY = SearchResult("knn_top1", 180, 12, OWN)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


class Sink:
    """Keeps what is recorded."""

    def __init__(self) -> None:
        self.trials: list[tuple[int, str, int]] = []

    def log_trial(self, row: TrialRow, metric: str) -> None:
        self.trials.append((row.number, row.status, row.epoch))


def row(number: int, ratio: float, *scores: float, **changes: str) -> TrialRow:
    curve = tuple(TrialScore(3 * (i + 1), score, {2: score}) for i, score in enumerate(scores))
    trial = TrialRow(number, OWN | {"mask.ratio": ratio}, curve=curve)
    return replace(trial, **changes)  # type: ignore[arg-type]


def test_every_trial_is_compared_with_the_best_of_the_same_epoch(lines: pytest.LogCaptureFixture) -> None:
    sink = Sink()
    progress = SearchProgress(sink)
    own, other = row(0, 0.75, 0.5), row(1, 0.6, 0.55)
    progress.on_begin(EMPTY.with_row(row(0, 0.75)), row(0, 0.75))
    progress.on_score(EMPTY.with_row(own), own)
    progress.on_begin(EMPTY.with_row(own).with_row(row(1, 0.6)), row(1, 0.6))
    both = EMPTY.with_row(own).with_row(other)
    progress.on_score(both, other)
    progress.on_score(both, own)
    progress.on_end(
        both, replace(other, status="stopped early", status_reason="by ASHA after epoch 3: too weak")
    )
    assert lines.messages == [
        "trial 0: baseline config",
        "trial 0  epoch  3/12  kNN top-1 0.500",
        "trial 1: mask.ratio 0.6",
        "trial 1  epoch  3/12  kNN top-1 0.550  new best",
        "trial 0  epoch  3/12  kNN top-1 0.500  behind trial 1 (0.550)",
        "trial 1  stopped by ASHA after epoch 3: too weak",
    ]
    assert sink.trials[-1] == (1, "stopped early", 3)


def test_a_tie_has_an_equals_sign(lines: pytest.LogCaptureFixture) -> None:
    own, other = row(0, 0.75, 0.5), row(1, 0.6, 0.5)
    SearchProgress(Sink()).on_score(EMPTY.with_row(own).with_row(other), other)
    assert lines.messages == ["trial 1  epoch  3/12  kNN top-1 0.500  = trial 0 (0.500)"]


def test_a_trial_that_was_not_trained_has_a_reason(lines: pytest.LogCaptureFixture) -> None:
    progress = SearchProgress(Sink())
    progress.on_end(
        EMPTY, row(2, 0.9, status="infeasible", status_reason="mask.ratio 0.9 leaves block 0 no visible unit")
    )
    progress.on_end(EMPTY, row(3, 0.6, status="failed", status_reason="the loss of block 0 is not finite"))
    assert lines.messages == [
        "trial 2  infeasible: mask.ratio 0.9 leaves block 0 no visible unit",
        "trial 3  failed: the loss of block 0 is not finite",
    ]


def test_a_trial_that_is_continued_has_its_epoch(lines: pytest.LogCaptureFixture) -> None:
    SearchProgress(Sink()).on_begin(EMPTY, row(1, 0.6, 0.5))
    assert lines.messages == ["trial 1 continues after epoch 3: mask.ratio 0.6"]


def test_a_search_without_its_baseline_goes_on_and_says_so(lines: pytest.LogCaptureFixture) -> None:
    failed = row(0, 0.75, status="failed", status_reason="the loss of block 0 is not finite")
    SearchProgress(Sink()).on_end(EMPTY, failed)
    assert " ".join("".join(lines.messages).split()) == (
        "trial 0 failed: the loss of block 0 is not finite; the search goes on without the baseline config"
    )


def test_the_first_whole_trial_says_how_long_the_others_take(
    lines: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([100.0, 160.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    progress = SearchProgress(Sink(), trials=6, concurrent=2)
    progress.on_begin(EMPTY, row(0, 0.75))
    done = row(0, 0.75, 0.5, 0.5, 0.5, 0.5, status="finished")
    progress.on_end(EMPTY.with_row(done), done)
    assert lines.messages[-1] == "search: 5 of 6 trials left, at most about 3 min"


def test_the_opening_reads_like_its_snapshot() -> None:
    space = {
        "mask.ratio": Choice((0.75, 0.5, [0.6, 0.65, 0.7, 0.75])),
        "optim.blr": Range(1e-3, 1e-1, log=True, is_integer=False),
        "decoder.throw_ratio": Choice((0.0,)),
    }
    lines = opening(EMPTY, 6, space, trials=4, concurrent=2)
    assert_snapshot("search_opening", "\n".join(lines))
    assert max(map(len, lines)) <= 98


def test_the_closing_reads_like_its_snapshot() -> None:
    own, better = row(0, 0.75, 0.5, 0.5, 0.5, 0.5), row(1, 0.6, 0.6, 0.6, 0.6, 0.6)
    result = EMPTY.with_row(replace(own, status="finished")).with_row(replace(better, status="finished"))
    lines = closing(result, 90, "runs/a/search/best.yaml")
    assert_snapshot("search_closing", "\n".join(lines))
