"""Nearest neighbors, linear probe and RankMe against what they are by definition."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from bim.orchestrator.evaluation import metrics
from bim.orchestrator.evaluation.metrics import (
    feature_covariance,
    fit_logistic_regression,
    level_with_best,
    linear_probe,
    rankme,
    score,
    standard_error,
    weighted_knn,
)
from bim.orchestrator.evaluation.progress import reported_to
from bim.orchestrator.evaluation.records import EvalConfig

K, T = 20, 0.07


def clusters(
    n: int, dim: int = 12, classes: int = 4, spread: float = 1.5, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """n points around `classes` centers that are the same for every seed."""
    centers = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    gen = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=gen)
    return centers[y] + spread * torch.randn(n, dim, generator=gen), y


def naive_knn(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, k: int, temperature: float
) -> float:
    """Image by image and vote by vote."""
    correct = 0
    for x, y in zip(test_x, test_y, strict=True):
        cosines = [float(x @ t / (x.norm() * t.norm())) for t in train_x]
        nearest = sorted(range(len(cosines)), key=lambda i: -cosines[i])[:k]
        votes: dict[int, float] = {}
        for i in nearest:
            label = int(train_y[i])
            votes[label] = votes.get(label, 0.0) + math.exp(cosines[i] / temperature)
        correct += max(sorted(votes), key=lambda label: votes[label]) == int(y)
    return correct / len(test_y)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.07), (20, 1.0)])
def test_nearest_neighbors_equal_a_naive_loop(k: int, temperature: float) -> None:
    train, test = clusters(80), clusters(50, seed=1)
    expected = naive_knn(*train, *test, k, temperature)
    assert 0.3 < expected < 1.0  # otherwise the comparison says nothing
    assert weighted_knn(*train, *test, k, temperature) == expected


def test_nearest_neighbors_in_chunks_equal_those_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = clusters(80), clusters(50, seed=1)
    whole = weighted_knn(*train, *test, K, T)
    monkeypatch.setattr(metrics, "KNN_CHUNK", 80 * 7)  # 7 test images at a time, the last chunk shorter
    assert weighted_knn(*train, *test, K, T) == whole


def test_length_of_an_embedding_does_not_move_its_neighbors() -> None:
    (train_x, train_y), test = clusters(80), clusters(50, seed=1)
    lengths = torch.rand(80, 1, generator=torch.Generator().manual_seed(2)) + 0.1
    scaled = weighted_knn(train_x * lengths, train_y, *test, K, T)
    assert scaled == weighted_knn(train_x, train_y, *test, K, T)


def test_fewer_training_images_than_k_all_vote() -> None:
    train, test = clusters(9), clusters(50, seed=1)
    assert weighted_knn(*train, *test, 20, T) == weighted_knn(*train, *test, 9, T)


def test_a_small_temperature_does_not_overflow() -> None:
    train, test = clusters(80), clusters(50, seed=1)
    assert weighted_knn(*train, *test, K, 1e-4) == weighted_knn(*train, *test, 1, T)


def objective(x: Tensor, y: Tensor, weight: Tensor, l2: float) -> float:
    """Mean cross-entropy + l2 / 2 |W|^2 in float64; the last row of `weight` is the bias."""
    weight = weight.double()
    log_p = torch.log_softmax(x.double() @ weight[:-1] + weight[-1], dim=1)
    return float(-log_p[torch.arange(len(y)), y].mean() + 0.5 * l2 * weight[:-1].square().sum())


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
def test_the_fit_is_the_minimum_that_scikit_learn_finds(l2: float) -> None:
    x, y = clusters(300)
    x = x @ torch.randn(12, 12, generator=torch.Generator().manual_seed(5))  # correlated, as embeddings are
    weight = fit_logistic_regression(x, y, feature_covariance(x), torch.zeros(13, 4), l2)
    reference = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-8, max_iter=5000).fit(x.numpy(), y.numpy())
    theirs = torch.from_numpy(np.vstack([reference.coef_.T, reference.intercept_]))
    assert objective(x, y, weight, l2) <= objective(x, y, theirs, l2) + 1e-5


def test_the_fit_is_the_same_in_either_coordinates_and_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = clusters(300)
    start = torch.zeros(13, 4)
    preconditioned = fit_logistic_regression(x, y, feature_covariance(x), start, 0.01)
    torch.testing.assert_close(
        fit_logistic_regression(x, y, None, start, 0.01), preconditioned, atol=0.01, rtol=0
    )
    monkeypatch.setattr(metrics, "PROBE_CHUNK", 16 * 7)
    chunked = fit_logistic_regression(x, y, feature_covariance(x), start, 0.01)
    torch.testing.assert_close(chunked, preconditioned, atol=0.01, rtol=0)


def test_the_probe_ignores_scale_and_offset_of_features() -> None:
    (train_x, train_y), (test_x, test_y) = clusters(200), clusters(200, seed=1)
    scale, offset = torch.logspace(-2, 2, 12), torch.linspace(-9, 9, 12)
    plain = linear_probe(train_x, train_y, test_x, test_y, seed=0)
    moved = linear_probe(train_x * scale + offset, train_y, test_x * scale + offset, test_y, seed=0)
    assert moved.l2 == plain.l2
    assert moved.accuracy == pytest.approx(plain.accuracy, abs=0.006)  # one image: rounding at a boundary


def test_constant_features_do_no_harm() -> None:
    (train_x, train_y), (test_x, test_y) = clusters(200), clusters(200, seed=1)
    plain = linear_probe(train_x, train_y, test_x, test_y, seed=0)
    padded = linear_probe(
        torch.cat([train_x, torch.full((200, 3), 7.0)], dim=1),
        train_y,
        torch.cat([test_x, torch.full((200, 3), 7.0)], dim=1),
        test_y,
        seed=0,
    )
    assert padded.accuracy == pytest.approx(plain.accuracy, abs=0.006)


def test_the_probe_prefers_a_strong_penalty_for_few_noisy_images_and_a_weak_one_for_many_clean_ones() -> None:
    test = clusters(200, dim=60, spread=3.0, seed=1)
    noisy = linear_probe(*clusters(60, dim=60, spread=3.0), *test, seed=0)
    gen = torch.Generator().manual_seed(3)
    x = torch.randn(2000, 60, generator=gen)
    y = (x[:, 0] + 0.3 * x[:, 1] > 0).long() + 2 * (x[:, 2] > 0.2).long()
    clean = linear_probe(x[:1500], y[:1500], x[1500:], y[1500:], seed=0)
    assert clean.l2 < noisy.l2
    assert clean.accuracy > 0.9


def test_the_probe_gives_the_same_answer_twice() -> None:
    train, test = clusters(200), clusters(200, seed=1)
    assert linear_probe(*train, *test, seed=4) == linear_probe(*train, *test, seed=4)


def test_the_global_generator_is_left_alone() -> None:
    train, test = clusters(60), clusters(20, seed=1)
    before = torch.get_rng_state()
    score(*train, *test, EvalConfig())
    assert torch.equal(torch.get_rng_state(), before)


def test_standard_error_of_a_coin_and_of_certainty() -> None:
    assert standard_error(0.5, 100) == pytest.approx(0.05)
    assert standard_error(1.0, 100) == standard_error(0.0, 100) == pytest.approx(1 / 101)


@pytest.mark.parametrize("n", [1, 20, 413])
def test_at_0_and_1_the_error_is_the_bound_of_wilsons_interval(n: int) -> None:
    z = 1.0
    for p in (0.0, 1.0):
        center = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
        far_end = center + half if p == 0.0 else center - half
        assert standard_error(p, n) == pytest.approx(abs(far_end - p))


def test_scores_carry_the_errors_of_their_own_accuracies() -> None:
    train, test = clusters(80), clusters(50, seed=1)
    scores = score(*train, *test, EvalConfig())
    assert scores.knn_top1 == weighted_knn(*train, *test, K, T)
    assert scores.metrics()["knn_top1_se"] == standard_error(scores.knn_top1, 50)
    assert scores.metrics()["linear_top1_se"] == standard_error(scores.linear_top1, 50)


def test_models_are_level_by_the_images_on_which_they_differ() -> None:
    images = np.arange(400)
    best = images < 360  # 90 %, +- 1.5
    nested = best & (images >= 3)  # 3 images fewer and none more: an error of 3 / 400 is far from level
    mixed = np.roll(best, 200) & (images != 0)  # right and wrong on other images: 1 fewer is level
    assert level_with_best({2: nested, 4: best, 6: mixed, 8: best}) == {2: False, 4: True, 6: True, 8: True}
    assert level_with_best({2: np.zeros(5, bool), 4: np.zeros(5, bool)}) == {2: True, 4: True}


def test_an_accuracy_is_the_share_of_the_images_that_are_right() -> None:
    x, y = torch.eye(4), torch.arange(4)
    scores = metrics.score(x, y, x.roll(1, dims=0), torch.tensor([3, 0, 1, 0]), EvalConfig(knn_k=1))
    assert scores.knn_correct.tolist() == [True, True, True, False]
    assert scores.knn_top1 == 0.75


def test_an_empty_part_is_refused_by_name() -> None:
    train, empty = clusters(80), (torch.zeros(0, 12), torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match="test part has 0"):
        weighted_knn(*train, *empty, K, T)
    with pytest.raises(ValueError, match="training part has 0"):
        linear_probe(*empty, *train, seed=0)


def test_embeddings_that_are_not_finite_are_refused() -> None:
    (x, y), test = clusters(80), clusters(50, seed=1)
    x[3, 4] = float("nan")
    with pytest.raises(ValueError, match="training part are not finite"):
        score(x, y, *test, EvalConfig())


def test_rankme_is_the_number_of_directions_that_are_used_alike() -> None:
    orthonormal = torch.linalg.qr(torch.randn(64, 16, generator=torch.Generator().manual_seed(0)))[0]
    assert rankme(orthonormal) == pytest.approx(16, rel=1e-4)
    assert rankme(3.0 * orthonormal) == pytest.approx(16, rel=1e-4)  # whatever the scale
    assert rankme(torch.ones(64, 16)) == pytest.approx(1, abs=1e-4)
    assert rankme(torch.cat([orthonormal, orthonormal])) == pytest.approx(16, rel=1e-4)


def test_rankme_follows_the_papers_formula() -> None:
    values = torch.tensor([4.0, 2.0, 1.0, 1.0])
    p = [0.5, 0.25, 0.125, 0.125]
    entropy = -sum(q * math.log(q) for q in p)
    assert rankme(torch.diag(values)) == pytest.approx(math.exp(entropy), rel=1e-4)


def test_a_rank_of_embeddings_that_are_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        rankme(torch.full((4, 4), float("nan")))


def test_nearly_dependent_features_can_still_be_factored() -> None:
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(200, 1, generator=gen) + 1e-5 * torch.randn(200, 500, generator=gen)  # 500 copies of one
    y = (x[:, 0] > 0).long()
    assert linear_probe(x[:150], y[:150], x[150:], y[150:], seed=0).accuracy > 0.95


def test_votes_for_many_classes_are_counted_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    (train_x, train_y), (test_x, test_y) = clusters(80), clusters(50, seed=1)
    whole = weighted_knn(train_x, 1000 * train_y, test_x, 1000 * test_y, K, T)
    rows: list[int] = []
    scatter = Tensor.scatter_add_
    monkeypatch.setattr(
        Tensor, "scatter_add_", lambda votes, *rest: (rows.append(len(votes)), scatter(votes, *rest))[1]
    )
    monkeypatch.setattr(metrics, "KNN_CHUNK", 3001 * 7)
    assert weighted_knn(train_x, 1000 * train_y, test_x, 1000 * test_y, K, T) == whole
    assert rows == [7] * 7 + [1]


def test_accuracy_and_loss_in_blocks_equal_those_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = clusters(300)
    weight = torch.randn(13, 4, generator=torch.Generator().manual_seed(6))
    accuracy, loss = metrics._accuracy_and_loss(x, y, weight)
    assert loss == torch.nn.functional.cross_entropy(x @ weight[:-1] + weight[-1], y).item()
    monkeypatch.setattr(metrics, "PROBE_CHUNK", 4 * 7)
    assert metrics._accuracy_and_loss(x, y, weight) == (accuracy, pytest.approx(loss, rel=1e-6))


def test_the_covariance_in_blocks_equals_that_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = clusters(300)
    whole = feature_covariance(x)
    monkeypatch.setattr(metrics, "PROBE_CHUNK", 2 * 12 * 7)
    torch.testing.assert_close(feature_covariance(x), whole, rtol=1e-12, atol=1e-12)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("largest", "threads"), [(200 * 12 * 4, 2), (200 * 12 * 4 + 1, 1)])
def test_a_probe_of_a_small_problem_takes_one_thread_and_gives_the_others_back(
    monkeypatch: pytest.MonkeyPatch, largest: int, threads: int
) -> None:
    seen: set[int] = set()

    def spy(*args: object) -> Tensor:
        seen.add(torch.get_num_threads())
        return fit_logistic_regression(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(metrics, "fit_logistic_regression", spy)
    monkeypatch.setattr(metrics, "ONE_THREAD_PROBE", largest)
    linear_probe(*clusters(200), *clusters(50, seed=1), seed=0)
    assert seen == {threads}
    assert torch.get_num_threads() == 2

    def fail(*args: object) -> Tensor:
        raise ZeroDivisionError

    monkeypatch.setattr(metrics, "fit_logistic_regression", fail)
    with pytest.raises(ZeroDivisionError):
        linear_probe(*clusters(200), *clusters(50, seed=1), seed=0)
    assert torch.get_num_threads() == 2


def test_a_listener_can_end_nearest_neighbors_and_a_fit() -> None:
    def refuse(text: str) -> None:
        raise InterruptedError

    train, test = clusters(80), clusters(50, seed=1)
    with reported_to(refuse), pytest.raises(InterruptedError):
        weighted_knn(*train, *test, K, T)
    with reported_to(refuse), pytest.raises(InterruptedError):
        linear_probe(*train, *test, seed=0)
