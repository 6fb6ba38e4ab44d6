from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from bim.orchestrator.data.loader import Batch
from bim.orchestrator.training.build import mask_plans, open_spec_backbone
from bim.orchestrator.training.errors import NonFiniteLossError, StageFailure, StepOrderError
from bim.orchestrator.training.messages import StepRequest
from bim.orchestrator.training.restart_policy import RestartPolicy
from bim.orchestrator.training.spec import DecoderSpec, PretrainSpec
from bim.orchestrator.training.stage import Stage
from bim.orchestrator.training.stage_group import InProcessStages
from bim.orchestrator.training.transport import Payload

SPEC = PretrainSpec(
    backbone="vit_tiny_patch16_224",
    model_args={"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2},
    blocks=(1, 1, 1, 1),
    mask_ratios=(0.5, 0.5, 0.75, 0.75),
    decoders=(DecoderSpec(1, 16, 2),) * 4,
)
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 3, 16, 16), dtype=np.uint8)


class Loader:
    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at, self.closed = fails_at, False

    def batch(self, step: int, micro_step: int = 0) -> Batch:
        if step == self.fails_at:
            raise OSError("the disk is gone")
        return Batch(images=np.roll(IMAGES, step, axis=0), bad=(), load_s=0.0)

    def close(self) -> None:
        self.closed = True


def stages(
    stage_blocks: tuple[tuple[int, ...], ...], loader: Loader | None = None, spec: PretrainSpec = SPEC
) -> InProcessStages:
    group = InProcessStages(spec, lambda: loader or Loader(), stage_blocks)
    group.restore(None, 0)
    return group


def test_a_stage_refuses_every_step_but_its_own_next_one() -> None:
    stage = Stage(SPEC, (0,))
    stage.restore(None, 5)
    before = stage.weights()
    for wrong in (
        StepRequest(4, 1e-3),
        StepRequest(6, 1e-3),
        StepRequest(5, 1e-3, micro_step=1, grad_accum_steps=2),
    ):
        with pytest.raises(StepOrderError, match=r"expect \(step, micro_step\) \(5, 0\)"):
            stage.train_step(wrong, Payload("uint8", IMAGES), None)
    assert all(
        torch.equal(a, b) for a, b in zip(before[0].values(), stage.weights()[0].values(), strict=True)
    )
    stage.train_step(StepRequest(5, 1e-3), Payload("uint8", IMAGES), None)


@pytest.mark.parametrize("stage_blocks", [((0, 1, 2, 3),), ((0, 1), (2, 3)), ((0,), (1, 2), (3,))])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_placement_of_blocks_does_not_change_a_bit(
    stage_blocks: tuple[tuple[int, ...], ...], precision: str
) -> None:
    spec = replace(SPEC, optim=replace(SPEC.optim, precision=precision))
    apart, together = stages(((0,), (1,), (2,), (3,)), spec=spec), stages(stage_blocks, spec=spec)
    for group in (apart, together):
        for step in range(3):
            group.wait(group.submit(StepRequest(step, 1e-3)))
    a, b = apart.weights(), together.weights()
    assert all(torch.equal(a[k][name], b[k][name]) for k in a for name in a[k])


def test_masks_are_a_function_of_seed_step_and_micro_batch() -> None:
    def permutation(step: int, micro_step: int = 0) -> torch.Tensor:
        return mask_plans(SPEC, open_spec_backbone(SPEC), (16, 16), 4, step, micro_step)[0].permutation

    assert torch.equal(permutation(3), permutation(3))
    assert not torch.equal(permutation(3), permutation(4))
    assert not torch.equal(permutation(3), permutation(3, 1))


SWIN = PretrainSpec(
    backbone="swin_tiny_patch4_window7_224",
    model_args={
        "img_size": 96,
        "depths": [1, 1, 4, 1],
        "embed_dim": 8,
        "num_heads": [1, 1, 2, 2],
        "window_size": 4,
    },
    blocks=(1, 1, 2, 2, 1),
    mask_ratios=(0.5, 0.5, 0.6, 0.6, 0.75),
    decoders=(DecoderSpec(1, 16, 2, throw_ratio=0.3, recovery="aggregate"),) * 4 + (DecoderSpec(1, 16, 2),),
)


def swin_stages(stage_blocks: tuple[tuple[int, ...], ...]) -> InProcessStages:
    class Large(Loader):
        def batch(self, step: int, micro_step: int = 0) -> Batch:
            images = np.random.default_rng(step).integers(0, 256, (3, 3, 96, 96), dtype=np.uint8)
            return Batch(images=images, bad=(), load_s=0.0)

    return stages(stage_blocks, Large(), SWIN)


def test_a_swin_on_visible_tokens_is_the_same_wherever_its_blocks_live() -> None:
    groups = [swin_stages(blocks) for blocks in (((0, 1, 2, 3, 4),), ((0,), (1, 2), (3, 4)))]
    for group in groups:
        for step in range(2):
            report = group.wait(group.submit(StepRequest(step, 1e-3)))
            blocks = {k: metrics for stage in report.stages for k, metrics in stage.blocks.items()}
            assert {"loss_thrown", "loss_newly_masked"} <= set(blocks[2])
    a, b = (group.weights() for group in groups)
    assert all(torch.equal(a[k][name], b[k][name]) for k in a for name in a[k])


@pytest.mark.parametrize(("asked", "shared"), [(None, True), (True, True), (False, False)])
def test_a_batch_shares_its_mask_where_the_family_does_unless_told_otherwise(
    asked: bool | None, shared: bool
) -> None:
    spec = replace(SWIN, mask_per_batch=asked)
    plan = mask_plans(spec, open_spec_backbone(spec), (96, 128), 4, step=0, micro_step=0)[2]
    assert torch.equal(plan.permutation, plan.permutation[:1].expand(4, -1)) is shared
    assert plan.encoder_indices is not None
    assert plan.encoder_indices.levels[2].groups[0, 0].token_of_slot.shape[0] == (1 if shared else 4)  # type: ignore[attr-defined]
    for indices in (plan.decode, plan.thrown):
        assert indices.shape[1] > 0
        assert torch.equal(indices, indices[:1].expand(4, -1)) is shared
    vit = mask_plans(SPEC, open_spec_backbone(SPEC), (16, 16), 4, step=0, micro_step=0)[0]
    assert not torch.equal(vit.permutation, vit.permutation[:1].expand(4, -1))


def test_wait_raises_an_error_that_names_the_component() -> None:
    group = stages(((0, 1), (2, 3)), Loader(fails_at=0))
    pending = group.submit(StepRequest(0, 1e-3))
    with pytest.raises(StageFailure, match=r"the data loader failed at step 0 \(OSError: the disk is gone\)"):
        group.wait(pending)


def test_a_stage_is_named_by_its_blocks() -> None:
    group = stages(((0, 1), (2, 3)), spec=replace(SPEC, mean=(float("nan"),) * 3))
    with pytest.raises(
        StageFailure, match=r"stage 0 \(blocks 0-1\) failed at step 0 \(NonFiniteLossError"
    ) as caught:
        group.wait(group.submit(StepRequest(0, 1e-3)))
    assert not RestartPolicy(3).restarts(caught.value, 0)
    assert isinstance(caught.value.cause, NonFiniteLossError)


def test_a_step_that_raised_is_worth_a_restart_until_they_are_used_up() -> None:
    failure = StageFailure("stage 1 (block 1)", "at step 3", RuntimeError("flaky"), process_lost=False)
    assert RestartPolicy(2).restarts(failure, 0)
    assert RestartPolicy(2).restarts(failure, 1)
    assert not RestartPolicy(2).restarts(failure, 2)


def test_a_plan_is_made_during_the_previous_step(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = []

    def slow(spec: PretrainSpec, backbone: object, size: tuple[int, int], *rest: object) -> object:
        time.sleep(0.3)
        planned.append((size, *rest[:2]))
        return mask_plans(spec, backbone, size, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("bim.orchestrator.training.stage.mask_plans", slow)
    stage = Stage(SPEC, (0,))
    stage.restore(None, 0)
    waits = []
    for step, images in enumerate((IMAGES, IMAGES, IMAGES[..., :12])):
        _, report = stage.train_step(StepRequest(step, 1e-3), Payload("uint8", images), None)
        waits.append(report.mask_wait_s)
        time.sleep(0.5)  # the other stages compute
    assert waits[0] >= 0.3
    assert waits[1] < 0.1
    assert waits[2] >= 0.3  # another size: the prefetched plan is discarded
    assert planned[:4] == [((16, 16), 4, 0), ((16, 16), 4, 1), ((16, 16), 4, 2), ((16, 12), 4, 2)]


def test_waiting_for_a_plan_counts_as_idle_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*rest: object) -> object:
        time.sleep(0.5)
        return mask_plans(*rest)  # type: ignore[arg-type]

    monkeypatch.setattr("bim.orchestrator.training.stage.mask_plans", slow)
    stage = Stage(SPEC, (0,))
    stage.restore(None, 0)
    _, report = stage.train_step(StepRequest(0, 1e-3), Payload("uint8", IMAGES), None)
    assert report.mask_wait_s >= 0.5
    assert report.idle_s >= report.mask_wait_s
    assert report.busy_s < 0.5
