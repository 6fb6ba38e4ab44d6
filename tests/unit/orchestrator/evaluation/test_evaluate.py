"""The evaluation protocol on small models and made-up images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from bim.models.tokens import normalize_images
from bim.orchestrator.data.errors import TooManyCorruptImagesError
from bim.orchestrator.data.splits import Splits
from bim.orchestrator.evaluation import evaluate
from bim.orchestrator.evaluation.evaluate import evaluate_variants, raw_pixels
from bim.orchestrator.evaluation.features import (
    subsample,
)
from bim.orchestrator.evaluation.metrics import rankme
from bim.orchestrator.evaluation.records import DepthReport, EvalConfig
from tests.unit.orchestrator.evaluation.blobs import MEAN, QUICK, SPLITS, STD, Blobs, embed, inputs, vit


@pytest.mark.parametrize("extra", [{}, {"reg_tokens": 3}, {"class_token": False}])
def test_the_embedding_is_the_mean_of_the_patch_tokens_and_what_timm_pools(extra: dict[str, Any]) -> None:
    model = vit(**extra)
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 16, 16), dtype=np.uint8)
    ours = embed(model, images[:3], images[3:])
    x = normalize_images(torch.from_numpy(images), MEAN, STD)
    with torch.inference_mode():
        tokens = model.forward_features(x)  # type: ignore[operator]
        pooled = model(x)
    torch.testing.assert_close(ours, tokens[:, model.num_prefix_tokens :].mean(dim=1))
    torch.testing.assert_close(ours, pooled)


def test_the_embedding_of_a_hierarchical_model_is_its_mean_over_the_last_map() -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=64, window_size=4, embed_dim=12, depths=(1, 1), num_heads=(1, 2),
        num_classes=0, global_pool="avg",
    ).eval()  # fmt: skip
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 64), dtype=np.uint8)
    with torch.inference_mode():
        last = model.forward_features(normalize_images(torch.from_numpy(images), MEAN, STD))
    torch.testing.assert_close(embed(model, images), last.mean(dim=(1, 2)))


def test_every_depth_is_measured_and_each_image_decoded_once() -> None:
    source = Blobs()
    variants = {2: vit(2), 1: vit(1)}
    config = EvalConfig(knn_k=5, batch_size=32, latency=False)
    one, two = evaluate_variants(variants, inputs(source, config))
    assert (one.depth, two.depth) == (1, 2)
    assert source.loads == len(SPLITS.train) + len(SPLITS.test)
    assert two.params == sum(p.numel() for p in variants[2].parameters())
    assert two.gflops > one.gflops > 0
    assert one.n_test == 30
    assert one.knn_top1 is not None
    assert one.linear_top1 is not None
    assert True in (one.level_with_best, two.level_with_best)
    assert one.linear_top1 > 0.9  # red or blue is easy
    assert set(one.metrics()) == {
        "knn_top1",
        "knn_top1_se",
        "linear_top1",
        "linear_top1_se",
        "params",
        "gflops",
    }


def test_without_labels_the_costs_and_the_rank_of_the_training_images_are_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bim.orchestrator.evaluation.model_cost.MEASURE_S", 0.01)
    monkeypatch.setattr("bim.orchestrator.evaluation.model_cost.WARM_UP_S", 0.0)
    source, variants = Blobs(labeled=False, bad=(3,)), {1: vit(1), 2: vit(2)}
    one, two = evaluate_variants(variants, inputs(source, EvalConfig(batch_size=32)))
    assert (one.knn_top1, one.linear_top1, one.knn_top1_se, one.linear_top1_se) == (None, None, None, None)
    assert source.loads == len(SPLITS.train)  # each once for all depths
    assert set(one.metrics()) == {"rankme", "params", "gflops", "latency_b1_ms", "latency_b64_ms"}
    assert "thread" in one.device
    images = np.stack([source.load(index).numpy() for index in SPLITS.train.tolist() if index != 3])
    for report in (one, two):
        embeddings = embed(variants[report.depth], images)
        assert report.rankme == pytest.approx(rankme(embeddings), rel=1e-4)
        assert 1 < (report.rankme or 0) < 32
        assert (report.n_ranked, report.n_test) == (79, 0)


def test_the_rank_is_of_a_part_of_many_images_drawn_from_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "RANKME_IMAGES", 40)

    def measured(seed: int) -> DepthReport:
        config = EvalConfig(seed=seed, latency=False)
        return evaluate_variants({1: vit(1)}, inputs(Blobs(labeled=False), config))[0]

    assert measured(0).n_ranked == 40
    assert measured(0) == measured(0)
    assert measured(0).rankme != measured(1).rankme


def test_the_score_comes_from_the_test_split_alone() -> None:
    class WrongOutsideTest(Blobs):
        @property
        def labels(self) -> np.ndarray | None:
            labels = np.arange(self.n, dtype=np.int64) % 2
            labels[80:90] = 1 - labels[80:90]
            return labels

    splits = {
        "right": Splits(SPLITS.train, SPLITS.val, SPLITS.test),
        "wrong": Splits(SPLITS.train, SPLITS.test, SPLITS.val),
    }
    accuracy = {
        name: evaluate_variants({1: vit(1)}, inputs(WrongOutsideTest(), splits=split))[0]
        for name, split in splits.items()
    }
    assert (accuracy["right"].linear_top1 or 0) > 0.9
    assert (accuracy["wrong"].linear_top1 or 0) < 0.1


def test_unreadable_images_are_left_out_with_their_labels() -> None:
    source = Blobs(bad=(0, 1, 2, 95))
    (report,) = evaluate_variants({1: vit(1)}, inputs(source))
    assert report.n_test == 29
    assert (report.linear_top1 or 0) > 0.9


def test_a_split_without_a_readable_image_is_an_error_that_names_the_source() -> None:
    with pytest.raises(ValueError, match="blobs"):
        raw_pixels(inputs(Blobs(bad=tuple(range(90, 120)))))


def test_raw_pixels_are_scored_at_the_evaluation_size() -> None:
    scores = raw_pixels(inputs(Blobs(), EvalConfig(knn_k=5)))
    assert scores.n_test == 30
    assert scores.linear_top1 == 1.0
    assert raw_pixels(inputs(Blobs(), EvalConfig(knn_k=5))) == scores


def test_raw_pixels_of_large_images_are_averaged_over_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    widths = []

    def spy(train_x: Tensor, *rest: object) -> str:
        widths.append(tuple(train_x.shape))
        return "scored"

    monkeypatch.setattr(evaluate, "score", spy)
    raw_pixels(inputs(Blobs()))
    raw_pixels(inputs(Blobs(), size=(224, 160)))
    monkeypatch.setattr(evaluate, "RAW_VALUES", 3 * 16 * 16 * 20)
    raw_pixels(inputs(Blobs()))
    assert widths == [(80, 3 * 16 * 16), (80, 3 * 56 * 40), (20, 3 * 16 * 16)]


def test_a_large_split_is_sampled_by_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    indices = np.arange(100, 200)
    drawn = subsample(indices, 10, seed=3)
    assert len(np.unique(drawn)) == 10
    assert np.array_equal(drawn, np.sort(drawn))
    assert set(drawn) <= set(indices)
    assert np.array_equal(drawn, subsample(indices, 10, seed=3))
    assert not np.array_equal(drawn, subsample(indices, 10, seed=4))
    assert np.array_equal(subsample(indices, 100, seed=3), indices)


def test_raw_pixels_without_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="no labels"):
        raw_pixels(inputs(Blobs(labeled=False)))


def test_a_report_names_its_metrics_as_they_are_logged() -> None:
    report = DepthReport(3, 1000, 0.5, 1.25, 20.0, 0.75, 0.5, 0.02, 0.03, n_test=400)
    assert report.metrics() == {
        "knn_top1": 0.75,
        "knn_top1_se": 0.02,
        "linear_top1": 0.5,
        "linear_top1_se": 0.03,
        "params": 1000.0,
        "gflops": 0.5,
        "latency_b1_ms": 1.25,
        "latency_b64_ms": 20.0,
    }
    assert DepthReport(3, 1000, 0.5, rankme=12.5, n_ranked=64).metrics() == {
        "rankme": 12.5,
        "params": 1000.0,
        "gflops": 0.5,
    }


def test_images_without_a_label_are_in_no_accuracy() -> None:
    blobs = Blobs(unlabeled=(0, 1, 90, 91, 92))
    report = evaluate_variants({2: vit()}, inputs(blobs))[0]
    assert report.n_test == 27
    assert report.knn_top1 is not None


def test_without_labels_in_the_test_split_rankme_takes_the_place_of_accuracies() -> None:
    blobs = Blobs(unlabeled=tuple(range(90, 120)))
    report = evaluate_variants({2: vit()}, inputs(blobs))[0]
    assert report.knn_top1 is None
    assert report.rankme is not None


@pytest.mark.parametrize("bad", [(3, 4), (95, 96)])
def test_unreadable_images_of_every_split_are_counted_named_and_limited(bad: tuple[int, ...]) -> None:
    blobs, met = Blobs(bad=bad), dict[str, str]()
    evaluate_variants({2: vit()}, inputs(blobs), met)
    assert met == {f"blob {number}": "made so" for number in bad}
    with pytest.raises(
        TooManyCorruptImagesError, match=r"2 of \d+ images could not be read, the last being blob \d+"
    ):
        evaluate_variants({2: vit()}, inputs(blobs, replace(QUICK, max_bad_fraction=0.01)))


def test_features_that_do_not_fit_on_the_gpu_are_scored_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected, calls = raw_pixels(inputs(Blobs())), [0]
    score = evaluate.score

    def full(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return score(*args)

    monkeypatch.setattr(evaluate, "score", full)
    assert raw_pixels(inputs(Blobs())) == expected
    assert calls == [2]
    assert "features of 110 images" in caplog.text
