"""The metrics of a depth variant: how each is called, which direction is better, how its values read as text. A leaf.

To add a metric: one entry of `METRICS`, and a field of `DepthReport` with its key as the name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from bim.orchestrator.text import NOT_MEASURED, params_text, three_digits


@dataclass(frozen=True)
class MetricInfo:
    """One metric.

    Args:
        key: the name under which it is logged and sorted; `<key>_se` is its standard error, if it has one.
        name: in a sentence.
        heading: above the column of a table, with the unit.
        axis: along the axis of a figure, with the unit.
        higher_is_better: False for costs.
        text: a value as text in a sentence, without the unit.
        percent: a fraction 0..1, shown in per cent in tables and figures.
        title: above the panel of a figure, of the metrics that have a panel.
    """

    key: str
    name: str
    heading: str
    axis: str
    higher_is_better: bool
    text: Callable[[float], str]
    percent: bool = False
    title: str = ""

    @property
    def keys(self) -> tuple[str, ...]:
        """The key, and that of the standard error if it has one: the columns of a table for programs."""
        return (self.key, f"{self.key}_se") if self.percent else (self.key,)

    @property
    def scale(self) -> float:
        """Factor from a value to what tables and figures show."""
        return 100.0 if self.percent else 1.0

    def cell(self, values: Mapping[str, float | None]) -> str:
        """The cell of a table: `91.2±1.5` (per cent and one standard error), `31.3`, `85.8 M`; `-` if not measured."""
        value, error = values.get(self.key), values.get(f"{self.key}_se")
        if value is None:
            return NOT_MEASURED
        if not self.percent:
            return self.text(value)
        shown = f"{100 * value:.1f}".replace("100.0", "100")
        return shown if error is None else f"{shown}±{100 * error:.1f}"

    def by_depth(self, values: Iterable[float]) -> str:
        """`kNN top-1 by depth 41.0, 52.3 %`. values: of every depth, in order."""
        numbers = ", ".join(f"{self.scale * value:.1f}" for value in values)
        return f"{self.name} by depth {numbers}{' %' * self.percent}"


def _fraction(value: float) -> str:
    return f"{value:.3f}"


def _rank(value: float) -> str:
    return f"{value:.1f}"


_ACCURACY = "top-1 accuracy on test images, %"

METRICS = {
    info.key: info
    for info in (
        MetricInfo(
            "knn_top1", "kNN top-1", "kNN top-1 %", _ACCURACY, True, _fraction, True, "Nearest neighbors"
        ),
        MetricInfo(
            "linear_top1",
            "linear probe top-1",
            "linear top-1 %",
            _ACCURACY,
            True,
            _fraction,
            True,
            "Linear probe",
        ),
        MetricInfo(
            "rankme", "RankMe", "RankMe", "effective rank of the embeddings", True, _rank, title="RankMe"
        ),
        MetricInfo("params", "parameters", "params", "parameters", False, params_text),
        MetricInfo("gflops", "GFLOPs", "GFLOPs", "GFLOPs per image", False, three_digits),
        MetricInfo("latency_b1_ms", "ms, batch 1", "ms b1", "latency of one image, ms", False, three_digits),
        MetricInfo(
            "latency_b64_ms", "ms, batch 64", "ms b64", "latency of 64 images, ms", False, three_digits
        ),
    )
}
"""Key -> metric, in the order of the columns of a table: quality first, then cost."""

QUALITY = tuple(info for info in METRICS.values() if info.higher_is_better)
ACCURACIES = tuple(info for info in QUALITY if info.percent)
COST = tuple(info for info in METRICS.values() if not info.higher_is_better)

RANKED_BY = ("knn_top1", "rankme")
"""Keys of the metrics that variants and trials are ranked by: the first where there are labels, else the second."""


def same_scale(key: str) -> list[MetricInfo]:
    """The quality metrics that share the axis of metric `key`, itself among them: both accuracies, or RankMe alone."""
    return [info for info in QUALITY if info.axis == METRICS[key].axis]
