"""Records of an evaluation: its configuration and what it measured."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from bim.orchestrator.evaluation.metric_info import METRICS


@dataclass(frozen=True)
class EvalConfig:
    """How variants are measured; the same for every run that is to be compared.

    Args:
        knn_k, knn_temperature: neighbors of the weighted kNN, and T in the weight exp(similarity / T) of each.
        batch_size: images embedded at a time.
        latency: measure the latency of every variant too.
        seed: of samples of large splits, and of the validation part of the linear probe.
        max_bad_fraction: unreadable images of a split, above which the evaluation ends.
    """

    knn_k: int = 20
    knn_temperature: float = 0.07
    batch_size: int = 256
    latency: bool = True
    seed: int = 0
    max_bad_fraction: float = 1.0


@dataclass(frozen=True)
class EvaluationResult:
    """Measurements per depth, and where the files of each depth are. `random` and `raw` are empty without baselines.

    bad_images: sample id -> reason, of the images that could not be read and are in no score.
    """

    reports: tuple[DepthReport, ...] = ()
    random: tuple[DepthReport, ...] = ()
    raw: dict[str, float] = field(default_factory=dict)
    folders: dict[int, str] = field(default_factory=dict)
    pictures: dict[int, str] = field(default_factory=dict)
    bad_images: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class DepthReport:
    """Measurements of one depth variant. Metrics are called by their keys in `metric_info.METRICS`.

    Args:
        depth: layers.
        params: parameters, fixed positions too.
        gflops: 2 x multiply-accumulates / 1e9 of one image.
        latency_b1_ms, latency_b64_ms: median milliseconds of a batch of 1 and of 64; None if not measured.
        knn_top1, linear_top1: test accuracies in 0..1; None if the data has no labels.
        knn_top1_se, linear_top1_se: their standard errors.
        n_test: images they were counted on.
        rankme: effective rank of the embeddings of `n_ranked` training images, 1..width (arXiv 2210.02885); only without
            labels.
        n_ranked: images it was counted on.
        level_with_best: whether its kNN accuracy is at most one standard error of the paired difference behind that of the
            best depth; None if the data has no labels.
        image_size: (height, width) of the images.
        device: what the latencies were measured on.
    """

    depth: int
    params: int
    gflops: float
    latency_b1_ms: float | None = None
    latency_b64_ms: float | None = None
    knn_top1: float | None = None
    linear_top1: float | None = None
    knn_top1_se: float | None = None
    linear_top1_se: float | None = None
    n_test: int = 0
    image_size: tuple[int, int] | None = None
    device: str = ""
    rankme: float | None = None
    n_ranked: int = 0
    level_with_best: bool | None = None

    def metrics(self) -> dict[str, float]:
        """The values that were measured, by their keys in `metric_info.METRICS`, with standard errors."""
        return _metrics(self)


@dataclass(frozen=True)
class LinearProbeResult:
    """Test accuracy of a linear probe, and the L2 penalty (on the mean loss) that the validation part chose."""

    accuracy: float
    l2: float


@dataclass(frozen=True)
class Scores:
    """Top-1 accuracies on `n_test` images, in 0..1, with their standard errors.

    knn_correct: (n_test,) bool, whether the nearest neighbors give the label of each image.
    """

    knn_top1: float
    knn_top1_se: float
    linear_top1: float
    linear_top1_se: float
    n_test: int
    knn_correct: np.ndarray = field(compare=False, repr=False)

    def metrics(self) -> dict[str, float]:
        """The accuracies by their keys in `metric_info.METRICS`, with standard errors."""
        return _metrics(self)


def _metrics(record: DepthReport | Scores) -> dict[str, float]:
    """The fields that are metrics and were measured; a field has the key of its metric, or `<key>_se`."""
    values = {key: getattr(record, key, None) for info in METRICS.values() for key in info.keys}
    return {name: float(value) for name, value in values.items() if value is not None}
