from __future__ import annotations

from dataclasses import replace

import pytest
import timm.layers
import torch

from orchestrator.block_trainer import Precision
from orchestrator.family_spec import DecoderSpec
from orchestrator.method_costs import (
    SMALL_DECODER,
    cost,
    depth_runs,
    encoder_cost,
    explicit_attention,
    family,
    forward_gmacs,
    methods,
    plan_seconds,
    sampler_seconds,
)

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}


def test_throwing_half_of_the_tokens_saves_28_percent_of_a_vit_base_maes_arithmetic() -> None:
    mae, thrown, *_ = methods("vit_base_patch16_224", (3, 3, 3, 3))
    assert forward_gmacs(thrown.spec) / forward_gmacs(mae.spec) == pytest.approx(0.72, abs=0.005)


def test_a_family_with_small_decoders_costs_less_than_half_of_separate_runs_of_its_depths() -> None:
    name, layers = "vit_base_patch16_224", (3, 3, 3, 3)
    runs = depth_runs(name, layers, SMALL_DECODER)
    assert [run.blocks for run in runs] == [(3,), (6,), (9,), (12,)]
    share = forward_gmacs(family(name, layers, SMALL_DECODER)) / sum(map(forward_gmacs, runs))
    assert share == pytest.approx(0.44, abs=0.01)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_cost_of_a_method_is_measured_whole(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    spec = family("vit_tiny_patch16_224", (2, 2), DecoderSpec(1, 32, throw_ratio=0.25), model_args=TINY)
    found = cost(spec, 4, torch.device(device), "fp32", steps=2)
    assert found.gmacs > 0
    assert found.step_s > 0
    assert found.explicit >= found.fused > 0
    assert (found.peak is not None) == (device == "cuda")


def test_explicit_attention_ends_where_it_should() -> None:
    before = timm.layers.use_fused_attn()
    with explicit_attention():
        assert not timm.layers.use_fused_attn()
    assert timm.layers.use_fused_attn() == before


SWIN = {"img_size": 64, "depths": [1, 1, 2, 1], "embed_dim": 8, "num_heads": [1, 2, 2, 4], "window_size": 4}


def test_activations_of_the_encoder_alone_are_counted_in_the_precision_asked_for() -> None:
    spec = family("swin_tiny_patch4_window7_224", (5,), DecoderSpec(1, 32), model_args=SWIN)
    held = {
        (batch, precision): encoder_cost(spec, batch, torch.device("cpu"), precision, steps=1)[1]
        for batch in (2, 6)
        for precision in PRECISIONS
    }
    for precision in PRECISIONS:
        assert held[6, precision] == 3 * held[2, precision] > 0
    assert held[6, "bf16"] < held[6, "fp32"]


def test_the_cost_of_plans_is_measured_apart_from_the_step() -> None:
    spec = family("swin_tiny_patch4_window7_224", (1, 1, 2, 1), DecoderSpec(1, 32), model_args=SWIN)
    assert plan_seconds(spec, 2, steps=2) > 0
    assert plan_seconds(replace(spec, sweep_groups=True), 2, steps=2) > 0
    found = sampler_seconds(spec, 2, steps=2, throw_ratio=0.25)
    assert [grid for grid, _ in found] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    for _, times in found:
        assert {"furthest", "random", "cells"} <= set(times)
        assert min(times.values()) > 0
