"""Cost of each method: multiply-accumulates, seconds of a training step, and activations held for its backward passes.

Everything is measured in one process, as a ratio to MAE in the same process. Serves `pipelines/benchmark.py`.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import timm.layers
import torch

from bim.models.backbones import open_backbone
from bim.models.backbones.backbone import Backbone
from bim.models.backbones.timm_models import RESERVED_ARGS
from bim.models.masks.plan import MaskPlan, partial_plan
from bim.models.masks.sampling import SAMPLERS
from bim.orchestrator.benchmarks.activation_memory import autocast, counting_saved, growing, saved_activations
from bim.orchestrator.evaluation.model_cost import forward_gflops
from bim.orchestrator.training.block_trainer import BlockTrainer
from bim.orchestrator.training.build import build_local_mim, mask_plans, open_spec_backbone
from bim.orchestrator.training.spec import DecoderSpec, Precision, PretrainSpec, TargetSpec

MASK_RATIO = 0.75
MAE_DECODER = DecoderSpec(8, 512)
SMALL_DECODER = DecoderSpec(1, 256)


@dataclass(frozen=True)
class Method:
    """One line of the table.

    Args:
        published: the ratio to MAE in the method's paper, "" if there is none.
    """

    name: str
    spec: PretrainSpec
    published: str = ""


@dataclass(frozen=True)
class Cost:
    """Cost of one training step.

    Args:
        gmacs: multiply-accumulates of the forward passes of one image, 1e9.
        step_s: seconds of the fastest step of the batch: forward, backward and update of all blocks in turn.
        fused, explicit: bytes of activations held for the backward pass of the batch, in the block that holds most, with
            fused and with explicit attention; see `saved_activations`.
        peak: maximum bytes allocated on the accelerator during a step; None on a CPU.
    """

    gmacs: float
    step_s: float
    fused: int
    explicit: int
    peak: int | None


def uniform_spec(
    backbone: str,
    blocks: tuple[int, ...],
    decoder: DecoderSpec,
    target: TargetSpec | None = None,
    **args: Any,
) -> PretrainSpec:
    """A spec with the same decoder and target for every block. args: model_args, encode."""
    return PretrainSpec(
        backbone=backbone,
        blocks=blocks,
        mask_ratios=(MASK_RATIO,) * len(blocks),
        decoders=(decoder,) * len(blocks),
        targets=(target or TargetSpec(),) * len(blocks),
        **({"model_args": {}} | args),
    )


def methods(backbone: str, layers: tuple[int, ...]) -> list[Method]:
    """MAE, PR-MIM, BIM, FastMIM and their combinations on one backbone. layers: of each BIM block.

    FastMIM's image size is 128, or the largest below that is a multiple of the mask unit; HOG cells are 8 pixels, or the
    largest below that divide the mask unit.
    """
    whole, unit = (sum(layers),), open_backbone(backbone, layers, {}).mask_unit_px
    size = max(unit, 128 // unit * unit)
    cell = next(cell for cell in range(8, 0, -1) if unit % cell == 0)
    thrown, small_thrown = (
        replace(decoder, throw_ratio=0.5, recovery="aggregate") for decoder in (MAE_DECODER, SMALL_DECODER)
    )
    hog, low = TargetSpec("hog", {"cell": cell}), {"img_size": size}
    k = f"K={len(layers)}"
    return [
        Method("MAE", uniform_spec(backbone, whole, MAE_DECODER), "1"),
        Method("PR-MIM 0.5", uniform_spec(backbone, whole, thrown), "MACs 0.72, memory 0.64"),
        Method(f"BIM {k}", uniform_spec(backbone, layers, MAE_DECODER)),
        Method(f"BIM {k} + PR-MIM 0.5", uniform_spec(backbone, layers, thrown)),
        Method(
            f"FastMIM {size}, HOG",
            uniform_spec(backbone, whole, SMALL_DECODER, hog, model_args=low, encode="all"),
            "time of an epoch 0.59, memory 0.34",
        ),
        Method(
            f"BIM {k} + PR-MIM 0.5, HOG, {size}, 1x256",
            uniform_spec(backbone, layers, small_thrown, hog, model_args=low),
        ),
    ]


def forward_gmacs(spec: PretrainSpec) -> float:
    """Multiply-accumulates / 1e9 of the forward passes of one image through all blocks and decoders."""
    backbone = open_spec_backbone(spec)
    return forward_gflops(spec, backbone, backbone.image_size) / 2


def step_seconds(
    spec: PretrainSpec, batch: int, device: torch.device, precision: Precision, steps: int
) -> tuple[float, int | None]:
    """Seconds of the fastest of `steps` training steps of `batch` random images, all blocks one after the other, and the
    maximum bytes allocated on the accelerator (None on a CPU).

    Mask plans are made outside the timing, because a run prefetches them on another thread; see `plan_seconds`.
    """
    backbone = open_spec_backbone(spec)
    optim = replace(spec.optim, precision=precision)
    trainers = [
        BlockTrainer(build_local_mim(spec, k, backbone), k, optim, device) for k in range(len(spec.blocks))
    ]
    images = torch.rand(batch, 3, *backbone.image_size, generator=torch.Generator().manual_seed(0)).to(device)

    def run(step: int, plans: dict[int, MaskPlan]) -> None:
        x = images
        for k, trainer in enumerate(trainers):
            y, _ = trainer.train_step(x, images, plans[k], step=step, lr=1e-4)
            x = y.float()

    return _fastest(run, spec, backbone, batch, device, steps)


def cost(spec: PretrainSpec, batch: int, device: torch.device, precision: Precision, steps: int) -> Cost:
    """All figures of one method. Activations are counted on the CPU."""
    fused = max(saved_activations(spec, batch, precision=precision))
    with explicit_attention():
        explicit = max(saved_activations(spec, batch, precision=precision))
    seconds, peak = step_seconds(spec, batch, device, precision, steps)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return Cost(forward_gmacs(spec), seconds, fused, explicit, peak)


def encoder_cost(
    spec: PretrainSpec, batch: int, device: torch.device, precision: Precision, steps: int
) -> tuple[float, int, int | None]:
    """The encoder of a K = 1 spec: seconds of the fastest forward and backward pass, bytes of activations held for the
    backward pass (counted on the CPU, in that precision), and the maximum bytes allocated on the accelerator. Mask plans
    are made outside the timing, as in `step_seconds`."""
    backbone = open_spec_backbone(spec)
    block, size = backbone.build_block(0, spec.seed).train(), backbone.image_size
    images = torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(0))

    def count(number: int) -> list[int]:
        sample = torch.rand(number, 3, *size, generator=torch.Generator().manual_seed(0))
        plan = mask_plans(spec, backbone, size, number, 0, 0)[0]
        with counting_saved(iter(block.parameters())) as saved, autocast("cpu", precision):
            block(sample, plan)
        return [saved.total]

    (held,) = growing(count, batch)
    block, images = block.to(device), images.to(device)

    def run(step: int, plans: dict[int, MaskPlan]) -> None:
        with autocast(device.type, precision):
            tokens = block(images, plans[0])
        tokens.float().square().mean().backward()
        block.zero_grad(set_to_none=True)

    seconds, peak = _fastest(run, spec, backbone, batch, device, steps)
    return seconds, held, peak


def _fastest(
    run: Callable[[int, dict[int, MaskPlan]], None],
    spec: PretrainSpec,
    backbone: Backbone,
    batch: int,
    device: torch.device,
    steps: int,
) -> tuple[float, int | None]:
    """Seconds of the fastest of `steps` calls of `run` after one to warm up, without the mask plans; and the maximum bytes
    allocated on the accelerator."""
    times = []
    for step in range(steps + 1):
        if device.type == "cuda" and step == 1:
            torch.cuda.reset_peak_memory_stats(device)
        plans = mask_plans(spec, backbone, backbone.image_size, batch, step, 0, device=device)
        started = _now(device)
        run(step, plans)
        times.append(_now(device) - started)
    return min(times[1:]), torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def plan_seconds(spec: PretrainSpec, batch: int, steps: int) -> float:
    """Median seconds, over `steps` plans, of the mask plans of all blocks for a batch on the CPU."""
    backbone = open_spec_backbone(spec)
    times = []
    for step in range(steps):
        started = time.perf_counter()
        mask_plans(spec, backbone, backbone.image_size, batch, step, 0)
        times.append(time.perf_counter() - started)
    return median(times)


def sampler_seconds(
    spec: PretrainSpec, batch: int, steps: int, throw_ratio: float
) -> list[tuple[tuple[int, int], dict[str, float]]]:
    """For each block its token grid (rows, columns), and sampler -> median seconds of choosing the tokens to decode, for a
    batch on the CPU. Raises ValueError if `throw_ratio` leaves a decoder no masked token."""
    backbone = open_spec_backbone(spec)
    plans = mask_plans(spec, backbone, backbone.image_size, batch, 0, 0)

    def seconds(plan: MaskPlan, sampler: str) -> float:
        times = []
        for step in range(steps):
            gen, started = torch.Generator().manual_seed(step), time.perf_counter()
            partial_plan(plan, throw_ratio, sampler, gen)
            times.append(time.perf_counter() - started)
        return median(times)

    return [
        (plan.token_grid, {sampler: seconds(plan, sampler) for sampler in SAMPLERS})
        for plan in plans.values()
    ]


def light_decoders(spec: PretrainSpec) -> PretrainSpec:
    """The same spec with cheaper decoders on fine grids: width 64 and 0.65 of all tokens thrown above 28 x 28 tokens, width
    128 and 0.5 thrown above 14 x 14; thrown tokens are drawn at random and not recovered."""
    decoders = []
    for info, decoder in zip(open_spec_backbone(spec).blocks, spec.decoders, strict=True):
        tokens = info.grid[0] * info.grid[1]
        for max_tokens, dim, throw in ((28 * 28, 64, 0.65), (14 * 14, 128, 0.5)):
            if tokens > max_tokens:
                decoder = replace(decoder, dim=dim, throw_ratio=throw, recovery="none", sampler="random")
                break
        decoders.append(decoder)
    return replace(spec, decoders=tuple(decoders))


@contextmanager
def explicit_attention() -> Iterator[None]:
    """Inside the context timm builds attention that stores its N x N weights, without a fused kernel."""
    before = timm.layers.use_fused_attn()
    timm.layers.set_fused_attn(False)
    try:
        yield
    finally:
        timm.layers.set_fused_attn(bool(before))


def depth_runs(backbone: str, layers: tuple[int, ...], decoder: DecoderSpec) -> list[PretrainSpec]:
    """End-to-end runs (K = 1), one for each depth of a BIM run with these blocks."""
    full = open_backbone(backbone, layers, {})
    runs = []
    for info in full.blocks:
        args = {key: v for key, v in full.variant_args(info.depth).items() if key not in RESERVED_ARGS}
        runs.append(uniform_spec(backbone, (info.depth,), decoder, model_args=args))
    return runs


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
