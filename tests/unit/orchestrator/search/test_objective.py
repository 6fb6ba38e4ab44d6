"""What trials are ranked by: the evaluation's kNN on another split, RankMe without labels, and the arithmetic of a step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bim.orchestrator.data.phases import PhaseSpec, phases_on
from bim.orchestrator.data.source import Source, open_source
from bim.orchestrator.data.splits import Splits
from bim.orchestrator.evaluation.evaluate import evaluate_variants
from bim.orchestrator.evaluation.inputs import EvalInputs
from bim.orchestrator.evaluation.records import EvalConfig
from bim.orchestrator.search.objective import (
    metric_of,
    score_checkpoint,
    score_weights,
    training_gflops,
)
from bim.orchestrator.training.build import build_local_mim, open_spec_backbone
from bim.orchestrator.training.checkpoint import save_block
from bim.orchestrator.training.depth_variants import random_variants
from bim.orchestrator.training.spec import DecoderSpec, OptimSpec, PretrainSpec

SPEC = PretrainSpec(
    backbone="vit_tiny_patch16_224",
    model_args={"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2},
    blocks=(2, 2),
    mask_ratios=(0.5, 0.75),
    decoders=(DecoderSpec(1, 32, 2),) * 2,
    optim=OptimSpec(),
)
SPLITS = Splits(np.arange(0, 200), np.arange(200, 260), np.arange(260, 360))
CONFIG = EvalConfig(knn_k=5, batch_size=64, latency=False)


def weights() -> list[dict[str, Tensor]]:
    return [build_local_mim(SPEC, k).state_dict() for k in range(2)]


def inputs(source: Source, splits: Splits = SPLITS) -> EvalInputs:
    return EvalInputs(source, splits, (16, 16), SPEC.mean, SPEC.std, torch.device("cpu"), CONFIG)


def test_the_score_is_the_evaluations_knn_on_the_validation_split_averaged_over_the_depths() -> None:
    source, backbone = digits(), open_spec_backbone(SPEC)
    score = score_weights(backbone, weights(), inputs(source))
    as_test = Splits(SPLITS.train, SPLITS.test, SPLITS.val)
    variants = random_variants(SPEC, backbone, (2, 4))
    reports = evaluate_variants(variants, inputs(source, as_test))
    assert score.metric == "knn_top1"
    assert score.by_depth == {report.depth: report.knn_top1 for report in reports}
    assert score.mean == pytest.approx(sum(score.by_depth.values()) / 2)
    assert score.images == 60


def test_a_committed_checkpoint_is_scored_like_its_weights(tmp_path: Path) -> None:
    for k, state in enumerate(weights()):
        save_block(tmp_path, k, state, {})
    expected = score_weights(open_spec_backbone(SPEC), weights(), inputs(digits()))
    assert score_checkpoint(SPEC, (digits(), SPLITS), CONFIG, tmp_path) == expected


def test_the_test_split_is_never_looked_at() -> None:
    source = digits()
    seen: list[int] = []
    load = source.load
    source.load = lambda index: (seen.append(index), load(index))[1]  # type: ignore[method-assign, func-returns-value]
    score_weights(open_spec_backbone(SPEC), weights(), inputs(source))
    assert set(seen) == {*SPLITS.train.tolist(), *SPLITS.val.tolist()}


def test_without_labels_or_a_validation_split_the_rank_of_the_training_images_counts() -> None:
    source = digits()
    no_val = Splits(SPLITS.train, SPLITS.val[:0], SPLITS.test)
    assert (metric_of(source, SPLITS), metric_of(source, no_val)) == ("knn_top1", "rankme")
    score = score_weights(open_spec_backbone(SPEC), weights(), inputs(source, no_val))
    assert score.metric == "rankme"
    assert score.images == 200
    assert all(1 < rank < 32 for rank in score.by_depth.values())


def test_the_cost_of_a_training_image_falls_with_the_mask_the_throw_ratio_and_the_size() -> None:
    whole = phases_on([PhaseSpec(0, (16, 16), 8)], 64)
    own = training_gflops(SPEC, whole, 4)
    masked = training_gflops(replace(SPEC, mask_ratios=(0.75, 0.75)), whole, 4)
    thrown = replace(SPEC, decoders=(DecoderSpec(1, 32, 2, throw_ratio=0.25),) * 2)
    growing = phases_on([PhaseSpec(0, (8, 8), 8), PhaseSpec(3, (16, 16), 8)], 64)
    small = training_gflops(SPEC, phases_on([PhaseSpec(0, (8, 8), 8)], 64), 4)
    assert masked < own
    assert training_gflops(thrown, whole, 4) < own
    assert training_gflops(SPEC, growing, 4) == pytest.approx(0.75 * small + 0.25 * own)


def digits() -> Source:
    return open_source("digits")
