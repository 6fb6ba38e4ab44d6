from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bim.orchestrator.data.loader import Batch
from bim.orchestrator.training import checkpoint_writer
from bim.orchestrator.training.build import mask_plans, open_spec_backbone
from bim.orchestrator.training.checkpoint import load_block_weights, save_block
from bim.orchestrator.training.errors import (
    DeviceMemoryError,
    NonFiniteLossError,
    StageFailure,
    StepOrderError,
    TrainingError,
)
from bim.orchestrator.training.manifest import FileRecord
from bim.orchestrator.training.messages import StepRequest
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
    group.restore(None, 0, lambda: False)
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
            group.wait(group.submit(StepRequest(step, 1e-3)), 0)
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
            report = group.wait(group.submit(StepRequest(step, 1e-3)), 0)
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
        group.wait(pending, 0)


def test_a_stage_is_named_by_its_blocks() -> None:
    group = stages(((0, 1), (2, 3)), spec=replace(SPEC, mean=(float("nan"),) * 3))
    message = r"stage 0 \(blocks 0-1\) failed at step 0: the loss of block 0 is not finite"
    with pytest.raises(StageFailure, match=message) as caught:
        group.wait(group.submit(StepRequest(0, 1e-3)), 0)
    assert isinstance(caught.value.cause, NonFiniteLossError)


def test_a_device_that_is_broken_ends_a_run_whose_stages_share_a_process() -> None:
    group = stages(((0, 1), (2, 3)))

    def broken(*arguments: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    group._stages[1].train_step = broken  # type: ignore[assignment]
    failure = group.submit(StepRequest(0, 1e-3))
    assert isinstance(failure, StageFailure)
    assert "in broken" in failure.details
    with pytest.raises(
        TrainingError, match=r"stage 1 \(blocks 2-3\) failed .* illegal memory access.*--resume"
    ):
        group.start(lambda: False)


def test_a_full_memory_ends_such_a_run_with_what_would_fit_and_no_word_of_a_broken_device() -> None:
    group = stages(((0, 1), (2, 3)))

    def full(*arguments: object) -> None:
        raise DeviceMemoryError(
            "the device memory of blocks 2-3 is full; a data.batch_size of about 24 would fit"
        )

    group._stages[1].train_step = full  # type: ignore[assignment]
    assert isinstance(group.submit(StepRequest(0, 1e-3)), StageFailure)
    with pytest.raises(TrainingError, match=r"about 24 would fit") as caught:
        group.start(lambda: False)
    assert "--resume" not in str(caught.value)


def test_a_memory_that_does_not_hold_the_weights_is_told_with_the_stage() -> None:
    group = stages(((0, 1), (2, 3)))

    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    group._stages[1].restore = full  # type: ignore[assignment]
    with pytest.raises(StageFailure, match=r"stage 1 \(blocks 2-3\) failed while restoring .*out of memory"):
        group.restore(None, 0, lambda: False)
    with pytest.raises(TrainingError, match=r"stage 1 \(blocks 2-3\) failed while restoring"):
        group.start(lambda: False)


def test_training_waits_for_a_copy_of_the_state_and_not_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*arguments: object) -> list[FileRecord]:
        time.sleep(2)
        return save_block(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint_writer, "save_block", slow)
    wide = {"img_size": 16, "patch_size": 4, "embed_dim": 384, "depth": 4, "num_heads": 2}
    stage = Stage(replace(SPEC, model_args=wide), (0,))
    stage.restore(None, 0)
    stage.train_step(StepRequest(0, 1e-3), Payload("uint8", IMAGES), None)  # the optimizer has a state
    weights = stage.weights()

    def cpu_s(function: Callable[[], object]) -> float:
        started = time.thread_time()
        function()
        return time.thread_time() - started

    copying_s = max(cpu_s(stage._copy_blocks) for _ in range(3))
    started = time.perf_counter()
    pause_s = cpu_s(lambda: stage.save(str(tmp_path / "step-1")))
    assert time.perf_counter() - started < 1
    assert pause_s < 1.5 * copying_s + 0.005
    _, report = stage.train_step(StepRequest(1, 1e-3), Payload("uint8", IMAGES), None)
    assert report.saved == ()
    (saved,) = stage.flush()
    assert saved.checkpoint == str(tmp_path / "step-1")
    assert len(saved.files) == 2
    # What is on the disk is the state at the mark, though the weights have moved on.
    written = load_block_weights(tmp_path / "step-1", 0)
    assert all(torch.equal(written[name], weights[0][name]) for name in weights[0])
    assert not all(torch.equal(written[name], value) for name, value in stage.weights()[0].items())


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
