from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bim.models.masks.plan import block_plans, random_permutation
from bim.models.seeding import generator
from bim.orchestrator.training.block_trainer import BlockTrainer, decay_groups
from bim.orchestrator.training.build import build_local_mim
from bim.orchestrator.training.errors import NonFiniteLossError
from bim.orchestrator.training.spec import DecoderSpec, OptimSpec, PretrainSpec

SPEC = PretrainSpec(
    backbone="vit_tiny_patch16_224",
    model_args={"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2},
    blocks=(1, 1),
    mask_ratios=(0.5, 0.75),
    decoders=(DecoderSpec(1, 16, 2),) * 2,
)
PLANS = block_plans(random_permutation(4, 16, generator(0)), (4, 4), (8, 4))
IMAGES = torch.randn(4, 3, 16, 16, generator=generator("images"))


def trainer(block: int = 0, **optim: object) -> BlockTrainer:
    return BlockTrainer(build_local_mim(SPEC, block), block, OptimSpec(**optim), torch.device("cpu"))  # type: ignore[arg-type]


def step(
    t: BlockTrainer, number: int = 0, lr: float = 1e-3, images: Tensor = IMAGES, **micro_step: int
) -> Tensor:
    return t.train_step(images, images, PLANS[0], step=number, lr=lr, **micro_step)[0]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_what_leaves_is_detached_and_the_loss_falls() -> None:
    t = trainer()
    losses = []
    for number in range(20):
        y, metrics = t.train_step(IMAGES, IMAGES, PLANS[0], step=number, lr=3e-3)
        assert not y.requires_grad
        losses.append(metrics["loss"])
    assert losses[-1] < losses[0]
    assert metrics["grad_norm"] > 0


def test_a_restored_trainer_goes_on_bit_for_bit() -> None:
    whole, cut = trainer(), trainer()
    for number in range(6):
        step(whole, number)
    for number in range(3):
        step(cut, number)
    restored = trainer()
    restored.load(cut.weights(), cut.state_dict())
    for number in range(3, 6):
        step(restored, number)
    assert same(whole.weights(), restored.weights())
    assert same(whole.state_dict(), restored.state_dict())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_refused_before_the_weights_are_touched(bad: float) -> None:
    t = trainer()
    before = t.weights()
    with pytest.raises(
        NonFiniteLossError, match=r"loss of block 0 is not finite at step 7 \(learning rate 0\.001\)"
    ):
        step(t, 7, images=torch.full_like(IMAGES, bad))
    assert same(before, t.weights())


def test_two_micro_batches_are_one_step_of_their_mean_gradient() -> None:
    one, two = trainer(), trainer()
    step(one)
    step(two, micro_step=0, grad_accum_steps=2)
    step(two, micro_step=1, grad_accum_steps=2)
    assert all(torch.allclose(one.weights()[k], w, atol=1e-6) for k, w in two.weights().items())


def test_no_decay_on_norms_biases_and_tokens() -> None:
    module = build_local_mim(SPEC, 0)
    decayed, plain = decay_groups(module.named_parameters(), 0.05)
    names = {id(p): n for n, p in module.named_parameters()}
    assert plain["weight_decay"] == 0
    assert all(names[id(p)].endswith("weight") and p.ndim >= 2 for p in decayed["params"])
    free = {names[id(p)] for p in plain["params"]}
    assert {
        "decoder.mask_token",
        "encoder.stem.cls_token",
        "decoder.norm.weight",
        "decoder.head.bias",
    } <= free
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_clipping_bounds_each_blocks_own_gradient() -> None:
    free, clipped = trainer(), trainer(clip_grad=1e-3)
    _, metrics = clipped.train_step(IMAGES, IMAGES, PLANS[0], step=0, lr=1e-3)
    step(free)
    assert metrics["grad_norm"] > 1e-3  # what is told is the norm before clipping
    assert not same(free.state_dict(), clipped.state_dict())


def test_bf16_sends_bf16_and_keeps_float32_weights() -> None:
    t = trainer(precision="bf16")
    assert step(t).dtype == torch.bfloat16
    assert all(w.dtype == torch.float32 for w in t.weights().values())


def test_fp16_keeps_its_scaler_through_a_checkpoint_and_skips_only_its_own_overflow() -> None:
    t = trainer(precision="fp16")
    before = t.weights()
    # The initial scale of 65,536 may overflow half precision; then the update is skipped and the scale halved.
    step(t)
    state = t.state_dict()
    assert float(state["scaler/scale"]) in (65536.0, 32768.0)
    if float(state["scaler/scale"]) == 32768.0:
        assert same(before, t.weights())
    restored = trainer(precision="fp16")
    restored.load(t.weights(), state)
    assert same(restored.state_dict(), state)
