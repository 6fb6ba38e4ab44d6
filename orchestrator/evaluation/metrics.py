"""Scores of frozen embeddings: weighted nearest neighbors, a linear probe, and RankMe where there are no labels.

Plain functions of feature matrices and integer labels, without a model or a data set.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bim.orchestrator.evaluation.progress import report_again
from bim.orchestrator.evaluation.records import EvalConfig, LinearProbeResult, Scores

KNN_CHUNK = 2**26
"""Similarities, or votes, held at once (float32, 256 MB), however large the two sets are."""

PROBE_CHUNK = 2**26
"""Feature values per pass of the probe (float32, 256 MB), so that the logits of a large set never lie in memory."""

ONE_THREAD_PROBE = 2**24
"""Multiply-accumulates of a pass of the probe over its images, below which it runs on one CPU thread.

Such a pass takes milliseconds, and at each of its many small operations the threads wait for one another: long, where
other programs take their CPUs. Seconds of a probe on 10 classes, on two cores that several other programs shared:

    training features   one thread      two threads
    1,280 x 64          2.1, 9.4        11.6, 15.7
    1,280 x 192         2.2, 9.8        12.0, 14.7
    4,000 x 384         4.4             5.6
"""

PROBE_L2 = (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5, 1e-6)
"""Penalties tried, strong to weak: each fit starts from the one before it, which is near."""

PROBE_PATIENCE = 2
"""Penalties in a row that may fail to improve on the validation part before weaker ones are left out."""

PROBE_VAL_FRACTION = 0.2

PROBE_ITERATIONS = 200

PRECONDITION_WIDTH = 2048
"""Widest features whose covariance is factored; wider ones (raw pixels) separate the classes without it."""

RANKME_EPSILON = 1e-7
"""The epsilon of RankMe for float32."""


class UnscorableError(ValueError):
    """Embeddings that no score can be computed of: not finite, or too few. The message is for the user."""


def score(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, config: EvalConfig) -> Scores:
    """Both accuracies of one set of embeddings; shapes and errors as in `weighted_knn` and `linear_probe`."""
    n = len(test_y)
    correct = knn_correct(train_x, train_y, test_x, test_y, config.knn_k, config.knn_temperature)
    knn = int(correct.sum()) / n
    probe = linear_probe(train_x, train_y, test_x, test_y, config.seed).accuracy
    return Scores(knn, standard_error(knn, n), probe, standard_error(probe, n), n, correct.cpu().numpy())


def standard_error(accuracy: float, n: int) -> float:
    """Standard error of an accuracy counted on `n` independent images: sqrt(p (1 - p) / n).

    At 0 and 1, where that is 0, the distance to the other end of Wilson's interval of one standard error: 1 / (n + 1).
    """
    if accuracy in (0.0, 1.0):
        return 1.0 / (n + 1)
    return math.sqrt(accuracy * (1.0 - accuracy) / n)


def weighted_knn(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, k: int, temperature: float
) -> float:
    """Top-1 accuracy of the k nearest training embeddings; arguments and errors as of `knn_correct`."""
    return int(knn_correct(train_x, train_y, test_x, test_y, k, temperature).sum()) / len(test_y)


def knn_correct(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, k: int, temperature: float
) -> Tensor:
    """Whether the k nearest training embeddings by cosine, each voting exp(similarity / temperature), give the label.

    Returns (m,) bool, a value for each test embedding.

    train_x: (n, D), test_x: (m, D) float; train_y: (n,), test_y: (m,) int64 in 0..C-1, on one device. With
    fewer than `k` training embeddings all of them vote. Equal votes go to the lowest class. Raises ValueError if a part
    is empty or its embeddings are not finite.
    """
    _check(train_x, train_y, test_x, test_y)
    classes = int(max(train_y.max(), test_y.max())) + 1
    k = min(k, len(train_x))
    bank = F.normalize(train_x, dim=1).T
    chunk = max(1, KNN_CHUNK // max(len(train_x), classes))
    correct = []
    for x, y in zip(test_x.split(chunk), test_y.split(chunk), strict=True):
        report_again()
        similarity, nearest = (F.normalize(x, dim=1) @ bank).topk(k, dim=1)  # (b, k)
        votes = x.new_zeros(len(x), classes)
        # exp((s - s_max) / T) = exp(s / T) up to a factor common to an image's votes; no overflow at a small T.
        votes.scatter_add_(1, train_y[nearest], ((similarity - similarity[:, :1]) / temperature).exp())
        correct.append(votes.argmax(dim=1) == y)
    return torch.cat(correct)


def level_with_best(correct: Mapping[int, np.ndarray]) -> dict[int, bool]:
    """By name, whether a model is at most one standard error of the paired difference behind the best one.

    The models are scored on the same images, so that their accuracies differ by the images on which one is right and the
    other is wrong alone: sd(best - model) / sqrt(n), which is smaller than the error of either accuracy.

    correct: (n,) bool for each model, whether it is right for each image.
    """
    best = correct[max(correct, key=lambda name: correct[name].mean())].astype(np.float64)
    levels = {}
    for name, values in correct.items():
        difference = best - values
        levels[name] = bool(difference.mean() <= difference.std() / math.sqrt(len(best)))
    return levels


def linear_probe(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, seed: int
) -> LinearProbeResult:
    """Multinomial logistic regression on standardized features, scored on the test part.

    Shapes as in `weighted_knn`. Features are standardized with mean and standard deviation of the training part. A fifth
    of the training part, drawn from `seed`, chooses the L2 penalty by its accuracy (among equals the smaller loss); the
    probe is then fitted again on all of it. Full-batch L-BFGS has no learning rate, and gives the same answer at every
    call. Raises ValueError as `weighted_knn` does, and for fewer than 2 training images.

    Beside the features it holds two copies of them, standardized, and blocks of `PROBE_CHUNK`.
    """
    _check(train_x, train_y, test_x, test_y)
    if len(train_x) < 2:
        raise UnscorableError(f"a linear probe needs at least 2 training images, got {len(train_x)}")
    num_classes = int(max(train_y.max(), test_y.max())) + 1
    with _threads_for(train_x.numel() * num_classes, train_x.device):
        return _linear_probe(train_x, train_y, test_x, test_y, num_classes, seed)


def _linear_probe(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, num_classes: int, seed: int
) -> LinearProbeResult:
    mean, std = train_x.mean(dim=0), train_x.std(dim=0, unbiased=False)
    scale = torch.where(std > 1e-6, std, torch.ones_like(std))  # a constant feature stays 0
    train_x, test_x = (train_x - mean).div_(scale), (test_x - mean).div_(scale)

    permutation = torch.randperm(len(train_x), generator=torch.Generator().manual_seed(seed)).to(
        train_x.device
    )
    num_val = max(1, round(PROBE_VAL_FRACTION * len(train_x)))
    val_x, val_y = train_x[permutation[:num_val]], train_y[permutation[:num_val]]
    fit_x, fit_y = train_x[permutation[num_val:]], train_y[permutation[num_val:]]

    covariance = feature_covariance(fit_x)
    weight = train_x.new_zeros(train_x.shape[1] + 1, num_classes)  # the last row is the bias
    best, chosen, since_best = (-1.0, 0.0), (0.0, weight), 0
    for l2 in PROBE_L2:
        weight = fit_logistic_regression(fit_x, fit_y, covariance, weight, l2)
        accuracy, loss = _accuracy_and_loss(val_x, val_y, weight)
        if (accuracy, -loss) > best:
            best, chosen, since_best = (accuracy, -loss), (l2, weight), 0
        elif (since_best := since_best + 1) == PROBE_PATIENCE:
            break
    del val_x, fit_x
    l2, weight = chosen
    weight = fit_logistic_regression(train_x, train_y, feature_covariance(train_x), weight, l2)
    return LinearProbeResult(_accuracy_and_loss(test_x, test_y, weight)[0], l2)


def rankme(embeddings: Tensor) -> float:
    """Effective rank of embeddings (n, D): exp of the entropy of their singular values, normalized to sum 1.

    RankMe (arXiv 2210.02885, equations 1 and 2): p_k = s_k / |s|_1 + eps, exp(-sum_k p_k log p_k). Between 1 (all on one
    line) and min(n, D). Raises UnscorableError if an embedding is not finite.
    """
    if not torch.isfinite(embeddings).all():
        raise UnscorableError("embeddings are not finite, so they cannot be scored")
    values = torch.linalg.svdvals(embeddings.float())
    p = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny) + RANKME_EPSILON
    return float(torch.exp(-(p * p.log()).sum()))


def feature_covariance(x: Tensor) -> Tensor | None:
    """x: (n, D) -> second moments (D, D) float64, or None where factoring them would cost more than it saves."""
    if x.shape[1] > PRECONDITION_WIDTH:
        return None
    # Summed in float64: correlated features have eigenvalues below float32's rounding of the largest one.
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for part in x.split(max(1, PROBE_CHUNK // (2 * x.shape[1]))):
        double = part.double()
        total.addmm_(double.T, double)
    return total / len(x)


def fit_logistic_regression(
    x: Tensor, y: Tensor, covariance: Tensor | None, start: Tensor, l2: float
) -> Tensor:
    """Minimize mean cross-entropy + l2 / 2 |W|^2 (the bias is free) from `start`; returns (D + 1, C), the last row the bias.

    x: (n, D); y: (n,) int64 in 0..C-1; covariance: `feature_covariance(x)`, or None for steps without preconditioner.
    L-BFGS runs in coordinates in which the problem is nearly round: W = L^-T V with L L^T = c Cov + l2 I, about the
    Hessian of the loss. Features of untrained networks are so correlated that without this 100 iterations end far from the
    optimum and show such features as worse than they are (0.87 instead of 0.92 on the digits): an unfair baseline. The
    minimum itself is the same in either coordinates.
    """
    weight = start.clone()
    factor = None if covariance is None else _factor(covariance, l2)
    if factor is not None:
        weight[:-1] = factor.T @ start[:-1]
    weight.grad = torch.zeros_like(weight)
    rows = max(1, PROBE_CHUNK // (x.shape[1] + weight.shape[1]))
    optimizer = torch.optim.LBFGS(
        [weight],
        max_iter=PROBE_ITERATIONS,
        tolerance_grad=1e-5,
        tolerance_change=1e-8,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def unpreconditioned() -> Tensor:
        if factor is None:
            return weight
        return torch.cat([torch.linalg.solve_triangular(factor.T, weight[:-1], upper=True), weight[-1:]])

    def closure() -> Tensor:
        report_again()
        # The gradient of softmax regression is x^T (softmax - onehot): written out, it needs no graph over all rows.
        current = unpreconditioned()
        loss = current.new_zeros(())
        grad = torch.zeros_like(current)
        for x_part, y_part in zip(x.split(rows), y.split(rows), strict=True):
            log_p = F.log_softmax(_logits(x_part, current), dim=1)
            loss -= log_p.gather(1, y_part[:, None]).sum()
            error = log_p.exp_()
            error[torch.arange(len(y_part), device=x.device), y_part] -= 1.0
            grad[:-1].addmm_(x_part.T, error)
            grad[-1] += error.sum(dim=0)
        grad /= len(x)
        grad[:-1].add_(current[:-1], alpha=l2)
        if factor is not None:
            grad[:-1] = torch.linalg.solve_triangular(factor, grad[:-1], upper=False)
        weight.grad = grad
        return loss / len(x) + 0.5 * l2 * current[:-1].square().sum()

    optimizer.step(closure)
    return unpreconditioned().detach()


def _check(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> None:
    for part, x, y in (("training", train_x, train_y), ("test", test_x, test_y)):
        if len(x) == 0 or len(x) != len(y):
            raise ValueError(f"the {part} part has {len(x)} embeddings and {len(y)} labels")
        if not torch.isfinite(x).all():
            raise UnscorableError(f"embeddings of the {part} part are not finite, so they cannot be scored")


def _logits(x: Tensor, weight: Tensor) -> Tensor:
    """x: (n, D), weight: (D + 1, C) -> (n, C)."""
    return torch.addmm(weight[-1], x, weight[:-1])


def _accuracy_and_loss(x: Tensor, y: Tensor, weight: Tensor) -> tuple[float, float]:
    """Accuracy and mean cross-entropy of x: (n, D), y: (n,) under weight: (D + 1, C)."""
    correct, loss = 0, 0.0
    rows = max(1, PROBE_CHUNK // weight.shape[1])
    for x_part, y_part in zip(x.split(rows), y.split(rows), strict=True):
        logits = _logits(x_part, weight)
        correct += int((logits.argmax(dim=1) == y_part).sum())
        loss += F.cross_entropy(logits, y_part).item() * (len(y_part) / len(y))
    return correct / len(y), loss


@contextmanager
def _threads_for(multiplications: int, device: torch.device) -> Iterator[None]:
    """Inside, one CPU thread for a problem with fewer multiply-accumulates per pass than `ONE_THREAD_PROBE`."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or multiplications >= ONE_THREAD_PROBE:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _factor(covariance: Tensor, l2: float) -> Tensor:
    """Cholesky factor of c Cov + (l2 + 1e-5) I; c is a typical p (1 - p) of the softmax, the 1e-5 keeps it definite."""
    hessian = 0.03 * covariance
    hessian.diagonal().add_(l2 + 1e-5)
    return torch.linalg.cholesky(hessian).float()
