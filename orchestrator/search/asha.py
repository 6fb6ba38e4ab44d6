"""The rule by which trials are stopped early: asynchronous successive halving (ASHA, arXiv:1810.05934, algorithm 2).

A function of the record alone, in the form of Tune's `ASHAScheduler` with one bracket, so that a search that is continued
decides as the unbroken one does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from bim.orchestrator.search.results import TrialRow, TrialScore


def rung_to_stop_at(
    row: TrialRow, others: Iterable[TrialRow], grace_period: int, epochs: int, reduction_factor: int
) -> int | None:
    """The rung at which a trial is to be stopped because of its newest score; None if it goes on.

    It is stopped if it has just passed a rung with a score below the best 1/`reduction_factor` of the other trials that
    have passed it so far. The rungs are `grace_period` times powers of the factor.

    Args:
        epochs: of a whole trial; its last score stops nothing.
    """
    newest = row.curve[-1]
    if newest.epoch >= epochs:
        return None
    rung, rungs = grace_period, list[int]()
    while rung <= newest.epoch:
        rungs.append(rung)
        rung *= reduction_factor
    for rung in reversed(rungs):
        if _score_at(row.curve[:-1], rung) is None:
            scores = [score for other in others if (score := _score_at(other.curve, rung)) is not None]
            below = bool(scores) and newest.score < np.nanpercentile(scores, 100 * (1 - 1 / reduction_factor))
            return rung if below else None
    return None


def _score_at(curve: Sequence[TrialScore], rung: int) -> float | None:
    """The first score after `rung` epochs or more; None if there is none yet."""
    return next((score.score for score in curve if score.epoch >= rung), None)
