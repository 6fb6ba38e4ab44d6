"""The device paths, where there is a device: pytest -m gpu. Needs neither Ray nor MLflow nor pydantic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bim.orchestrator.data.spec import DataSpec
from bim.orchestrator.training.messages import StepRequest
from bim.orchestrator.training.spec import DecoderSpec, PretrainSpec, TargetSpec
from bim.orchestrator.training.stage_group import InProcessStages
from bim.orchestrator.training.transport import ReceiveBuffer, to_message
from tests.integration.tiny import data, hierarchy, shifted, tiny_spec, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def on_gpu(precision: str, stage_blocks: tuple[tuple[int, ...], ...] = ((0, 1, 2, 3),)) -> InProcessStages:
    spec = tiny_spec()
    spec = replace(spec, optim=replace(spec.optim, precision=precision))
    return InProcessStages(spec, data().train_batches, stage_blocks, device="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_travels_from_device_to_device(dtype: torch.dtype) -> None:
    tensor = torch.randn(4, 17, 32, device="cuda").to(dtype)
    assert torch.equal(ReceiveBuffer(torch.device("cuda")).unpack("x", to_message(tensor)), tensor)


def thrown_histograms() -> tuple[PretrainSpec, DataSpec]:
    throw = DecoderSpec(1, 32, 2, throw_ratio=0.25, recovery="aggregate")
    return tiny_spec(decoders=(throw,) * 4, targets=(TargetSpec("hog", {"cell": 4}),) * 4), data()


def painted() -> tuple[PretrainSpec, DataSpec]:
    return tiny_spec(encode="all", mask_ratios=(0.75,) * 4), data()


@pytest.mark.parametrize(
    "case",
    [lambda: (tiny_spec(), data()), thrown_histograms, painted, lambda: hierarchy()[:2], shifted],
    ids=["plain", "thrown tokens and HOG", "painted", "Twins that grows", "Swin with shifted windows"],
)
def test_float32_losses_agree_with_the_cpu(case: Callable[[], tuple[PretrainSpec, DataSpec]]) -> None:
    spec, images = case()
    here = InProcessStages(spec, images.train_batches, ((0, 1, 2, 3),), threads=1)
    there = InProcessStages(spec, images.train_batches, ((0, 1), (2, 3)), device="cuda")
    for group in (here, there):
        group.restore(None, 0, lambda: False)
    for step in range(6):
        a, b = (g.wait(g.submit(StepRequest(step, 1e-3)), 0) for g in (here, there))
        losses = [[s.blocks[k]["loss"] for s in r.stages for k in s.blocks] for r in (a, b)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_and_resumes(tmp_path: Path, precision: str) -> None:
    result = train(on_gpu(precision), tmp_path, steps=20, every=10)
    assert result.step == 20
    assert train(on_gpu(precision), tmp_path, steps=40, every=10).step == 40


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_a_swin_on_visible_tokens(precision: str) -> None:
    spec, images = shifted()
    spec = replace(spec, optim=replace(spec.optim, precision=precision))
    group = InProcessStages(spec, images.train_batches, ((0, 1, 2, 3),), device="cuda")
    group.restore(None, 0, lambda: False)
    reports = [group.wait(group.submit(StepRequest(step, 1e-3)), 0) for step in range(10)]
    losses = [[s.blocks[k]["loss"] for s in report.stages for k in s.blocks] for report in reports]
    assert all(last < first for first, last in zip(losses[0], losses[-1], strict=True))
