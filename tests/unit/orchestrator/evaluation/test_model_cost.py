"""Parameters, FLOPs and latency of small models."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from bim.orchestrator.evaluation.model_cost import device_name, gflops, latencies_ms, num_params

WIDTH, LAYERS, TOKENS, PATCH = 32, 2, 17, 8


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=LAYERS,
        num_heads=2,
        num_classes=0,
    )
    return model.eval()


def test_a_linear_layer_costs_two_flops_per_weight() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10))
    assert num_params(model) == 1930
    assert gflops(model, (8, 8)) == pytest.approx(2 * 192 * 10 / 1e9)


def test_a_vit_costs_what_the_formula_says(vit: nn.Module) -> None:
    # multiply-accumulates: patch embedding, then 12 L d^2 + 2 L^2 d per layer
    embedding = (TOKENS - 1) * 3 * PATCH**2 * WIDTH
    layer = 12 * TOKENS * WIDTH**2 + 2 * TOKENS**2 * WIDTH
    assert gflops(vit, (32, 32)) == pytest.approx(2 * (embedding + LAYERS * layer) / 1e9)


def test_counting_leaves_the_model_as_it_was(vit: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    gflops(vit, (32, 32))
    assert all(torch.equal(before[name], tensor) for name, tensor in vit.state_dict().items())


def test_latency_is_the_median_over_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = iter([5.0, 0.5, 0.1, 0.3])  # the first one warms up
    clock = [0.0]

    class Slow(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            clock[0] += next(passes)
            return x

    monkeypatch.setattr("bim.orchestrator.evaluation.model_cost.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("bim.orchestrator.evaluation.model_cost.MEASURE_S", 0.85)
    assert latencies_ms({3: Slow()}, (8, 8), 2, torch.device("cpu")) == {3: pytest.approx(300.0)}


def test_models_take_turns_so_that_load_from_elsewhere_slows_all_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, order = [0.0], []

    class Named(nn.Module):
        def __init__(self, name: int) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            order.append(self.name)
            clock[0] += 0.1 * self.name
            return x

    monkeypatch.setattr("bim.orchestrator.evaluation.model_cost.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("bim.orchestrator.evaluation.model_cost.WARM_UP_S", 0.0)
    times = latencies_ms({2: Named(2), 5: Named(5)}, (8, 8), 1, torch.device("cpu"))
    assert times == {2: pytest.approx(200.0), 5: pytest.approx(500.0)}
    assert order == [2, 5] * 3  # a turn of warm-up, and as many as fill the budget


def test_a_pass_longer_than_the_budget_is_run_twice_only(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, passes = [0.0], [0]

    class Slow(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            clock[0] += 20.0
            passes[0] += 1
            return x

    monkeypatch.setattr("bim.orchestrator.evaluation.model_cost.time.perf_counter", lambda: clock[0])
    assert latencies_ms({3: Slow()}, (8, 8), 64, torch.device("cpu")) == {3: pytest.approx(20_000.0)}
    assert passes[0] == 2


def test_the_device_is_named_with_its_threads() -> None:
    assert device_name(torch.device("cpu")).startswith("CPU, ")
