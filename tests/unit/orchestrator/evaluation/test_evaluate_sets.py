"""Several sets of models evaluated together, on images decoded once; with worker processes and a listener."""

from __future__ import annotations

from typing import Any

import numpy as np
import psutil
import pytest
import timm
import torch
from torch import Tensor, nn

from bim.orchestrator.data import whole_images
from bim.orchestrator.data.digits import DigitsSource
from bim.orchestrator.data.splits import Splits
from bim.orchestrator.evaluation import evaluate
from bim.orchestrator.evaluation.evaluate import evaluate_sets, evaluate_variants, raw_pixels
from bim.orchestrator.evaluation.features import (
    EmbedderSet,
    extract_features,
    extract_sets,
)
from bim.orchestrator.evaluation.inputs import EvalInputs
from bim.orchestrator.evaluation.progress import reported_to
from bim.orchestrator.evaluation.records import DepthReport, EvalConfig
from tests.unit.orchestrator.evaluation.blobs import CPU, MEAN, QUICK, SPLITS, STD, Blobs, embed, inputs, vit


def conv(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module = timm.create_model(
        "resnet18", num_classes=0, stem_width=8, channels=(8, 8, 16, 16), layers=(1, 1, 1, 1)
    )
    return model.eval()


def test_sets_of_models_and_raw_pixels_have_the_scores_that_they_have_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluate, "MAX_IMAGES", 60)
    monkeypatch.setattr(evaluate, "RAW_VALUES", 3 * 16 * 16 * 25)  # 25 images of a split
    blobs = Blobs(bad=(3, 40, 95), unlabeled=(1, 2, 100))

    def made() -> tuple[dict[int, nn.Module], dict[int, nn.Module]]:
        return {1: vit(1), 2: vit(2)}, {1: conv(1), 2: conv(2)}

    met_alone: dict[str, str] = {}
    alone = [evaluate_variants(variants, inputs(blobs), met_alone) for variants in made()]
    raw_alone = raw_pixels(inputs(blobs))
    loads, met = blobs.loads, dict[str, str]()
    trained, random = made()
    reports, raw = evaluate_sets(
        {"trained": trained, "random": random}, inputs(blobs), met, with_raw_pixels=True
    )
    assert [reports["trained"], reports["random"]] == alone
    assert raw == raw_alone
    assert raw.n_test < reports["trained"][0].n_test
    assert met == met_alone
    # Labeled images of both splits (60 of 78, all 29), and the training images of the batch norms.
    assert blobs.loads - loads == 60 + 29 + len(SPLITS.train)
    for ours, theirs in zip((trained, random), made(), strict=True):
        evaluate_variants(theirs, inputs(blobs))
        for depth, model in ours.items():
            state = theirs[depth].state_dict()
            assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_sets_of_models_share_the_images_that_their_ranks_are_computed_on() -> None:
    blobs = Blobs(labeled=False)
    reports, raw = evaluate_sets(
        {"trained": {1: vit(1)}, "random": {1: vit(2)}}, inputs(blobs), with_raw_pixels=True
    )
    assert raw is None
    assert blobs.loads == len(SPLITS.train)
    assert reports["trained"] == evaluate_variants({1: vit(1)}, inputs(blobs))
    assert reports["random"] == evaluate_variants({1: vit(2)}, inputs(blobs))
    assert reports["trained"][0].rankme != reports["random"][0].rankme


def test_features_of_a_set_with_a_smaller_limit_are_those_that_it_has_alone() -> None:
    def pixels(images: np.ndarray) -> Tensor:
        return torch.from_numpy(images).float().flatten(1)

    blobs = Blobs(bad=(3, 40))
    small, large = EmbedderSet({0: pixels}, 13), EmbedderSet({1: pixels}, 70)
    both = extract_sets({"small": small, "large": large}, inputs(blobs), SPLITS.train)
    assert blobs.loads == 70
    for name, depth, limit in (("small", 0, 13), ("large", 1, 70)):
        alone, indices = extract_features({depth: pixels}, inputs(blobs), SPLITS.train, limit)
        assert np.array_equal(both[name].indices, indices)
        assert torch.equal(both[name].by_depth[depth], alone[depth])
    assert set(both["small"].indices) < set(both["large"].indices)


def test_latencies_are_measured_of_the_sets_that_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bim.orchestrator.evaluation.model_cost.MEASURE_S", 0.01)
    monkeypatch.setattr("bim.orchestrator.evaluation.model_cost.WARM_UP_S", 0.0)
    sets = {"trained": {1: vit(1)}, "random": {1: vit(2)}}
    reports, _ = evaluate_sets(sets, inputs(Blobs(), EvalConfig()), untimed={"random"})
    assert reports["trained"][0].latency_b64_ms
    assert reports["trained"][0].device
    assert (reports["random"][0].latency_b64_ms, reports["random"][0].device) == (None, "")


def test_raw_pixels_of_the_digits_have_the_accuracies_that_they_had_when_they_were_read_by_themselves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluate, "RAW_VALUES", 3 * 8 * 8 * 150)
    splits = Splits(np.arange(0, 400), np.arange(400, 400), np.arange(400, 700))
    digits = EvalInputs(DigitsSource(), splits, (8, 8), MEAN, STD, CPU, QUICK)
    reports, raw = evaluate_sets({"trained": {1: vit(1, img_size=8)}}, digits, with_raw_pixels=True)
    assert raw is not None
    assert (raw.knn_top1, raw.n_test) == (117 / 150, 150)
    assert raw.linear_top1 == pytest.approx(113 / 150, abs=0.007)  # one image
    assert reports["trained"][0].n_test == 300


DIGITS = Splits(np.arange(0, 100), np.arange(100, 100), np.arange(100, 150))


def evaluate_digits(workers: int) -> tuple[dict[str, list[DepthReport]], Any]:
    config = EvalConfig(batch_size=40, latency=False)
    digits = EvalInputs(DigitsSource(), DIGITS, (16, 16), MEAN, STD, CPU, config, workers)
    return evaluate_sets({"trained": {1: vit(1)}}, digits, with_raw_pixels=True)


def test_progress_and_scores_are_the_same_with_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(workers: int) -> tuple[Any, list[str]]:
        told: list[str] = []
        with reported_to(told.append):
            result = evaluate_digits(workers)
        return result, list(dict.fromkeys(told))

    alone = measured(0)
    monkeypatch.setattr(whole_images, "WORKERS_FROM_S", 0.0)
    assert measured(1) == alone
    assert alone[1] == [
        "",
        *(f"the train split: {done} of 100 images" for done in (40, 80, 100)),
        *(f"the test split: {done} of 50 images" for done in (40, 50)),
        "trained: kNN and linear probe of model 1 of 1",
        "raw pixels: kNN and linear probe of model 1 of 1",
        "trained: costs",
    ]


def test_a_listener_is_asked_within_a_batch_and_leaves_no_process_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(whole_images, "WORKERS_FROM_S", 0.0)
    before = psutil.Process().children()
    asked = [0]

    def refuse(text: str) -> None:
        if text == "the train split: 40 of 100 images":
            asked[0] += 1
            if asked[0] == 5:  # in the second batch
                raise InterruptedError

    with reported_to(refuse), pytest.raises(InterruptedError):
        evaluate_digits(workers=1)
    assert asked == [5]
    assert psutil.Process().children() == before


def test_a_listener_is_asked_at_every_layer_and_no_hook_stays() -> None:
    model, told = vit(2), list[str]()
    images = np.zeros((2, 3, 16, 16), dtype=np.uint8)
    with reported_to(told.append):
        embed(model, images)
    assert len(told) > 10
    assert not any(module._forward_pre_hooks for module in model.modules())
