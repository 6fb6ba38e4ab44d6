"""Optuna's searcher as the search uses it. Imports optuna, an optional extra: `tuner` imports this module on demand."""

from __future__ import annotations

from typing import Any

from ray.tune.search.optuna import OptunaSearch


class OptunaIgnoringUnscored(OptunaSearch):
    """Ignores reports without a score, those of infeasible and failing trials, on which `OptunaSearch` raises.

    Optuna still receives the outcome of such a trial at its end.
    """

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if result.get(self.metric) is not None:
            super().on_trial_result(trial_id, result)
