"""What the next trial of a search is, as a function of its record: draws without repetition, or Optuna's proposals."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from bim.orchestrator.search.results import SearchResult, TrialRow
from bim.orchestrator.search.space import Choice, Range, Space, combinations, draw_settings

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Proposer = Callable[[SearchResult], dict[str, Any] | None]
"""The changes of the trial after those of a record, the baseline first; None if it was the last."""

MAX_PROPOSALS = 20
"""Proposals of Optuna per trial, until one differs from those before."""


def proposer(
    searcher: Literal["random", "optuna"], space: Space, baseline: Mapping[str, Any], trials: int, seed: int
) -> Proposer:
    """What `search.searcher` proposes. Equal records have equal proposals, so a search can be continued from its record."""
    if searcher == "optuna":
        return _optuna_proposer(space, baseline, int(min(trials, combinations(space))), seed)
    draws = draw_settings(space, baseline, trials, seed)
    return lambda result: dict(draws[len(result.rows)]) if len(result.rows) < len(draws) else None


def _optuna_proposer(space: Space, baseline: Mapping[str, Any], trials: int, seed: int) -> Proposer:
    """The tree-structured Parzen estimator of Optuna, an optional extra, with a generator of its own for every trial."""
    import optuna

    optuna.logging.set_verbosity(logging.WARNING)
    distributions = {key: _distribution(values) for key, values in space.items()}

    def frozen(row: TrialRow) -> optuna.trial.FrozenTrial:
        state, value = optuna.trial.TrialState.FAIL, None
        if row.status == "finished":
            state, value = optuna.trial.TrialState.COMPLETE, row.score
        elif row.status == "stopped early":  # ranked by its score behind those of more epochs
            state, value = optuna.trial.TrialState.PRUNED, row.score
        params = {
            key: json.dumps(value) if isinstance(space[key], Choice) else value
            for key, value in row.changes.items()
        }
        scores = {score.epoch: score.score for score in row.curve}
        return optuna.trial.create_trial(
            state=state, value=value, params=params, distributions=distributions, intermediate_values=scores
        )

    def propose(result: SearchResult) -> dict[str, Any] | None:
        number = len(result.rows)
        if number >= trials:
            return None
        if number == 0:
            return dict(baseline)
        known = [row.changes for row in result.rows]
        ended = [frozen(row) for row in result.rows if row.status not in ("waiting", "running")]
        changes: dict[str, Any] = {}
        for attempt in range(MAX_PROPOSALS):
            draw = random.Random(f"{seed} trial {number} attempt {attempt}").getrandbits(31)
            sampler = optuna.samplers.TPESampler(seed=draw)
            study = optuna.create_study(direction="maximize", sampler=sampler)
            study.add_trials(ended)
            params = study.ask(distributions).params
            changes = {
                key: json.loads(value) if isinstance(space[key], Choice) else value
                for key, value in params.items()
            }
            if changes not in known:
                break
        return changes

    return propose


def _distribution(values: Choice | Range) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(values, Choice):  # Optuna takes no lists as candidates
        return CategoricalDistribution([json.dumps(value) for value in values.values])
    if values.is_integer:
        return IntDistribution(int(values.low), int(values.high), log=values.log)
    return FloatDistribution(values.low, values.high, log=values.log)
