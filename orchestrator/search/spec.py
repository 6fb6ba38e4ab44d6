"""What a search and its trials are made from: plain records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bim.orchestrator.config.schema import Settings
from bim.orchestrator.data.source import Source
from bim.orchestrator.distributed.placement import StageLayout
from bim.orchestrator.evaluation.records import EvalConfig
from bim.orchestrator.search.results import SearchResult
from bim.orchestrator.search.space import Space
from bim.orchestrator.training.spec import Precision


@dataclass(frozen=True)
class TrialSpec:
    """What all trials of a search share; plain values that can be pickled.

    Args:
        settings: the recipe, as nested plain values.
        layout: of the stages of one trial.
        folder: of the checkpoints of trials that run, or its URL.
        evaluation: how checkpoints are scored.
        fingerprint: of the images.
        device: where checkpoints are scored.
        max_concurrent_trials: trials that run at the same time.
        given: the images, if `data.source` names an object of the driver.
        run_id: of the run that searches, which the checkpoints of its trials carry.
    """

    settings: dict[str, Any]
    layout: StageLayout
    precision: Precision
    folder: str
    evaluation: EvalConfig
    fingerprint: str
    device: str = "cpu"
    max_concurrent_trials: int = 1
    given: Source | None = None
    run_id: str = ""


@dataclass(frozen=True)
class SearchSpec:
    """A search that is ready to start.

    Args:
        settings: the recipe.
        space: the values that are tried.
        trial: what every trial shares.
        initial: the record of this search so far; without rows before its first trial.
    """

    settings: Settings
    space: Space
    trial: TrialSpec
    initial: SearchResult
