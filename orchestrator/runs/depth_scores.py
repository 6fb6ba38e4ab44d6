"""Scores of the depths while a run trains: when, on how many images, in which file; the best, and whether they end it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bim.orchestrator.config.schema import Settings
from bim.orchestrator.data.phases import Phase
from bim.orchestrator.files import atomic_write
from bim.orchestrator.runs.resolve import epochs_between_scores

SCORES = "scores.json"

SCORED_FRACTION = 0.05
"""Images that all scores of a run take, over those that it trains on. To embed a whole image at every depth costs
one to two times as much as to train on one that is mostly masked."""

MIN_IMAGES = 500
"""Images of one score, fewer than which tell nothing."""


@dataclass(frozen=True)
class DepthScores:
    """The scores of one checkpoint; higher is better.

    Args:
        step: updates in the checkpoint.
        epoch: that ended with it, counted from 1.
        metric: "knn_top1" of the validation split (0..1) or "rankme" of the train split.
        by_depth: layers -> score.
        images: that they are counted on.
        seconds: that they took.
    """

    step: int
    epoch: int
    metric: str
    by_depth: dict[int, float]
    images: int
    seconds: float

    @property
    def mean(self) -> float:
        """The mean over the depths, by which checkpoints are compared."""
        return statistics.mean(self.by_depth.values())


def num_scores(settings: Settings) -> int:
    """How often a run is scored before its end."""
    every, epochs = epochs_between_scores(settings), settings.schedule.epochs
    return 0 if every is None else (epochs - 1) // every


def images_of_a_score(settings: Settings, phases: Sequence[Phase], total_steps: int) -> int:
    """Images of both splits that one score takes at most."""
    trained = phases[-1].images_per_step * total_steps
    return max(MIN_IMAGES, int(SCORED_FRACTION * trained / max(1, num_scores(settings))))


def read_scores(out: Path) -> list[DepthScores]:
    """What the run in `out` was scored with so far, by step. Empty if there is no file, or none that can be read."""
    try:
        rows = json.loads((out / SCORES).read_text(encoding="utf-8"))
        scores = [
            DepthScores(
                step=int(row["step"]),
                epoch=int(row["epoch"]),
                metric=str(row["metric"]),
                by_depth={int(depth): float(value) for depth, value in row["by_depth"].items()},
                images=int(row["images"]),
                seconds=float(row["seconds"]),
            )
            for row in rows
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    return sorted((score for score in scores if score.by_depth), key=lambda score: score.step)


def write_scores(out: Path, scores: Sequence[DepthScores]) -> None:
    """Write them all. Raises StorageError."""
    atomic_write(out / SCORES, json.dumps([asdict(score) for score in scores], indent=1) + "\n")


def best_scores(scores: Sequence[DepthScores], patience: int | None = None) -> DepthScores | None:
    """The best of the scores that count, the first one of equals; None without any.

    patience: scores after that many in a row without a better one do not count; None: all do.
    """
    best: DepthScores | None = None
    since = 0
    for score in scores:
        if best is None or score.mean > best.mean:
            best, since = score, 0
        else:
            since += 1
        if since == patience:
            break
    return best


def ends_early(scores: Sequence[DepthScores], patience: int | None) -> bool:
    """Whether `patience` scores in a row brought no better one."""
    if patience is None:
        return False
    best, since = float("-inf"), 0
    for score in scores:
        since = 0 if score.mean > best else since + 1
        best = max(best, score.mean)
        if since == patience:
            return True
    return False
