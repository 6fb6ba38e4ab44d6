"""What a search tries next is a function of its record."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Literal

import pytest

from bim.orchestrator.search.proposals import proposer
from bim.orchestrator.search.results import SearchResult, Status, TrialRow, TrialScore
from bim.orchestrator.search.space import Choice, Range, Space, draw_settings

SPACE: Space = {
    "schedule.resolution": Choice((None, [[0, 24], [0.5, 32]])),
    "optim.blr": Range(1e-3, 1e-1, log=True, is_integer=False),
    "decoder.depth": Range(1, 4, log=False, is_integer=True),
}
BASELINE = {"schedule.resolution": None, "optim.blr": 8e-3, "decoder.depth": 1}
EMPTY = SearchResult("knn_top1", 100, 4, BASELINE)
STATUSES: tuple[Status, ...] = ("finished", "stopped early", "infeasible", "failed", "running", "waiting")


def proposed(searcher: Literal["random", "optuna"], trials: int, past: SearchResult = EMPTY) -> SearchResult:
    """The record behind all proposals, with some outcome of each."""
    propose = proposer(searcher, SPACE, BASELINE, trials, seed=3)
    while (changes := propose(past)) is not None:
        number = len(past.rows)
        status = STATUSES[number % len(STATUSES)]
        curve = (TrialScore(2, changes["optim.blr"], {}),) if status in ("finished", "stopped early") else ()
        past = past.with_row(TrialRow(number, changes, status, curve=curve))
    return past


def without_last(result: SearchResult, rows: int) -> SearchResult:
    return replace(result, rows=result.rows[:rows])


def test_random_draws_are_those_of_the_space() -> None:
    rows = proposed("random", 6).rows
    assert [row.changes for row in rows] == draw_settings(SPACE, BASELINE, 6, seed=3)


def test_there_are_no_more_trials_than_combinations() -> None:
    space: Space = {"mask.ratio": Choice((0.75, 0.5))}
    propose = proposer("random", space, {"mask.ratio": 0.75}, 9, seed=0)
    record = SearchResult("knn_top1", 1, 1, {"mask.ratio": 0.75})
    for number in range(2):
        record = record.with_row(TrialRow(number, propose(record) or {}))
    assert propose(record) is None


@pytest.mark.parametrize("searcher", ["random", "optuna"])
def test_a_search_that_is_continued_proposes_what_the_unbroken_one_does(
    searcher: Literal["random", "optuna"],
) -> None:
    whole = proposed(searcher, 12)
    assert len(whole.rows) == 12
    for rows in (0, 1, 5, 11):
        assert proposed(searcher, 12, without_last(whole, rows)) == whole


def test_optuna_tries_the_baseline_first_and_stays_in_the_space() -> None:
    first, *others = [row.changes for row in proposed("optuna", 12).rows]
    assert first == BASELINE
    assert all(changes["schedule.resolution"] in (None, [[0, 24], [0.5, 32]]) for changes in others)
    assert all(1e-3 <= changes["optim.blr"] <= 1e-1 for changes in others)
    assert all(isinstance(changes["decoder.depth"], int) for changes in others)
    assert len({str(changes) for changes in [first, *others]}) == 12


def test_random_draws_need_no_optuna(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert len(proposed("random", 2).rows) == 2
    with pytest.raises(ImportError):
        proposer("optuna", SPACE, BASELINE, 2, seed=0)
