from __future__ import annotations

from dataclasses import replace

import pytest
import timm.layers
import torch

from bim.orchestrator.benchmarks.method_costs import (
    SMALL_DECODER,
    cost,
    depth_runs,
    encoder_cost,
    explicit_attention,
    forward_gmacs,
    light_decoders,
    methods,
    plan_seconds,
    sampler_seconds,
    uniform_spec,
)
from bim.orchestrator.evaluation.model_cost import block_gflops
from bim.orchestrator.training.build import open_spec_backbone
from bim.orchestrator.training.spec import DecoderSpec, Precision

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}


def test_throwing_half_of_the_tokens_saves_28_percent_of_a_vit_base_maes_arithmetic() -> None:
    mae, thrown, *_ = methods("vit_base_patch16_224", (3, 3, 3, 3))
    assert forward_gmacs(thrown.spec) / forward_gmacs(mae.spec) == pytest.approx(0.72, abs=0.005)


def test_a_family_with_small_decoders_costs_less_than_half_of_separate_runs_of_its_depths() -> None:
    name, layers = "vit_base_patch16_224", (3, 3, 3, 3)
    runs = depth_runs(name, layers, SMALL_DECODER)
    assert [run.blocks for run in runs] == [(3,), (6,), (9,), (12,)]
    share = forward_gmacs(uniform_spec(name, layers, SMALL_DECODER)) / sum(map(forward_gmacs, runs))
    assert share == pytest.approx(0.44, abs=0.01)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_cost_of_a_method_is_measured_whole(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    spec = uniform_spec("vit_tiny_patch16_224", (2, 2), DecoderSpec(1, 32, throw_ratio=0.25), model_args=TINY)
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
    spec = uniform_spec("swin_tiny_patch4_window7_224", (5,), DecoderSpec(1, 32), model_args=SWIN)
    held = {
        (batch, precision): encoder_cost(spec, batch, torch.device("cpu"), precision, steps=1)[1]
        for batch in (2, 6)
        for precision in PRECISIONS
    }
    for precision in PRECISIONS:
        assert held[6, precision] == 3 * held[2, precision] > 0
    assert held[6, "bf16"] < held[6, "fp32"]


def test_the_cost_of_plans_is_measured_apart_from_the_step() -> None:
    spec = uniform_spec("swin_tiny_patch4_window7_224", (1, 1, 2, 1), DecoderSpec(1, 32), model_args=SWIN)
    assert plan_seconds(spec, 2, steps=2) > 0
    assert plan_seconds(replace(spec, sweep_groups=True), 2, steps=2) > 0
    found = sampler_seconds(spec, 2, steps=2, throw_ratio=0.25)
    assert [grid for grid, _ in found] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    for _, times in found:
        assert {"furthest", "random", "cells"} <= set(times)
        assert min(times.values()) > 0


def test_sizes_and_cells_fit_other_patches() -> None:
    small = [
        m.spec for m in methods("vit_small_patch14_dinov2", (3, 3, 3, 3)) if m.spec.targets[0].name == "hog"
    ]
    assert [spec.model_args["img_size"] for spec in small] == [126, 126]
    assert [spec.targets[0].args["cell"] for spec in small] == [7, 7]


def test_light_decoders_take_the_weight_from_the_fine_grids() -> None:
    equal = uniform_spec("swin_tiny_patch4_window7_224", (2, 2, 6, 2), SMALL_DECODER)
    light = light_decoders(equal)
    assert [decoder.dim for decoder in light.decoders] == [64, 128, 256, 256]
    backbone = open_spec_backbone(equal)
    costs = [
        [decoder for _, decoder in block_gflops(spec, backbone, backbone.image_size)]
        for spec in (equal, light)
    ]
    assert costs[1][0] < 0.1 * costs[0][0]
    assert costs[1][2:] == costs[0][2:]


def test_separate_runs_of_a_pyramids_depths_are_shorter_pyramids() -> None:
    runs = depth_runs("swin_tiny_patch4_window7_224", (2, 2, 6, 2), SMALL_DECODER)
    assert [list(run.model_args["depths"]) for run in runs] == [[2], [2, 2], [2, 2, 6], [2, 2, 6, 2]]
    assert [open_spec_backbone(run).blocks[-1].depth for run in runs] == [2, 4, 10, 12]


def test_attention_is_counted_whatever_kernel_would_compute_it() -> None:
    # One layer with N tokens and width d costs 12 N d^2 + 2 N^2 d multiply-accumulates, the last term being attention.
    args = {"img_size": 64, "patch_size": 4, "embed_dim": 32, "num_heads": 2}
    one, two = (
        forward_gmacs(
            uniform_spec(
                "vit_tiny_patch16_224", (layers,), DecoderSpec(1, 32), model_args={**args, "depth": layers}
            )
        )
        for layers in (1, 2)
    )
    tokens = 256 // 4 + 1  # a quarter of the patches is visible
    assert 1e9 * (two - one) == pytest.approx(12 * tokens * 32**2 + 2 * tokens**2 * 32)
