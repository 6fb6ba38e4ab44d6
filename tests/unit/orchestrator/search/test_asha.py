"""The rule of early stopping is that of Tune's scheduler."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from ray.tune.schedulers import ASHAScheduler

from bim.orchestrator.search.asha import rung_to_stop_at
from bim.orchestrator.search.results import TrialRow, TrialScore


def row(number: int, *scores: float, every: int = 1) -> TrialRow:
    points = tuple(TrialScore(every * (i + 1), score, {2: score}) for i, score in enumerate(scores))
    return TrialRow(number, {}, curve=points)


def test_a_trial_below_the_median_of_those_before_it_is_stopped_at_the_rung() -> None:
    others = [row(0, 0.1, 0.5), row(1, 0.1, 0.7)]
    assert rung_to_stop_at(row(2, 0.0), others, 2, 8, 2) is None  # before the grace period
    assert rung_to_stop_at(row(2, 0.0, 0.59), others, 2, 8, 2) == 2
    assert rung_to_stop_at(row(2, 0.0, 0.6), others, 2, 8, 2) is None
    assert rung_to_stop_at(row(2, 0.0, 0.6, 0.1), others, 2, 8, 2) is None  # between two rungs


def test_the_first_at_a_rung_and_a_whole_trial_are_not_stopped() -> None:
    assert rung_to_stop_at(row(0, 0.1, 0.1), [], 2, 8, 2) is None
    assert rung_to_stop_at(row(0, 0.1, 0.1), [row(1, 0.5)], 2, 8, 2) is None
    assert rung_to_stop_at(row(0, 0.1, 0.1), [row(1, 0.5, 0.5)], 2, 2, 2) is None


@pytest.mark.parametrize(("grace", "every", "factor"), [(1, 1, 2), (2, 1, 3), (3, 2, 2), (4, 4, 4)])
def test_it_decides_as_the_scheduler_of_tune(grace: int, every: int, factor: int) -> None:
    epochs = 24
    for seed in range(20):
        rng = random.Random(seed)
        tune = ASHAScheduler(
            time_attr="epoch", metric="score", mode="max", max_t=epochs, grace_period=grace,
            reduction_factor=factor,
        )  # fmt: skip
        running, ended = {number: row(number) for number in range(8)}, list[TrialRow]()
        for number in running:
            tune.on_trial_add(None, SimpleNamespace(trial_id=str(number)))
        while running:
            number = rng.choice(list(running))
            trial = running[number]
            score = TrialScore(trial.epoch + every, rng.random(), {})
            trial = running[number] = trial.with_score(score)
            others = [*ended, *(other for other in running.values() if other.number != number)]
            report = {"epoch": score.epoch, "score": score.score}
            action = tune.on_trial_result(None, SimpleNamespace(trial_id=str(number)), report)
            is_stopped = rung_to_stop_at(trial, others, grace, epochs, factor) is not None
            assert (action == "STOP") == (is_stopped or score.epoch >= epochs)
            if action == "STOP":
                ended.append(running.pop(number))
