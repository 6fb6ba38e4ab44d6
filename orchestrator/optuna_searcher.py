"""Optuna's searcher as the search uses it. Imports optuna, an optional extra: `search.py` imports this only when asked."""

from __future__ import annotations

from typing import Any

from ray.tune.search.optuna import OptunaSearch


class PatientOptuna(OptunaSearch):
    """Passes over reports that carry no score, as those of infeasible and failing trials do; Ray's own stops at them.

    How such a trial ended Optuna hears all the same, when it is over.
    """

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if result.get(self.metric) is not None:
            super().on_trial_result(trial_id, result)
