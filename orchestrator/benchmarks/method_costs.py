"""What each method and each family costs: multiply-accumulates, seconds of a training step, activations held for it.

All as figures of one process, so that they can be set as ratios against an ordinary MAE in the same run. Serves
`pipelines/benchmark.py methods` and `family`; imports neither ray, mlflow nor pydantic, so that it runs on a bare GPU image.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import timm.layers
import torch

from bim.models.backbones import open_backbone
from bim.models.backbones.timm_models import RESERVED_ARGS
from bim.models.masks.plan import MaskPlan, partial_plan
from bim.models.masks.sampling import SAMPLERS
from bim.orchestrator.benchmarks.activation_memory import autocast, counting_saved, growing, saved_activations
from bim.orchestrator.evaluation.model_cost import forward_gflops
from bim.orchestrator.training.block_trainer import BlockTrainer
from bim.orchestrator.training.build import backbone_of, build_local_mim, plans_of_step
from bim.orchestrator.training.spec import DecoderSpec, FamilySpec, Precision, TargetSpec

MASK_RATIO = 0.75
MAE_DECODER = DecoderSpec(8, 512)
SMALL_DECODER = DecoderSpec(1, 256)


@dataclass(frozen=True)
class Method:
    """One line of the table.

    Args:
        published: the paper's ratio to MAE, where one is known (papers.md: READ), else "".
    """

    name: str
    spec: FamilySpec
    published: str = ""


@dataclass(frozen=True)
class Cost:
    """Of one training step, per image where not said otherwise.

    Args:
        gmacs: multiply-accumulates of the forward passes, 1e9.
        step_s: seconds of the fastest whole step of the batch: forward, backward, update, of all blocks in turn.
        fused, explicit: bytes of activations held for the backward pass, of the block that holds most, for the batch, in the
            precision of the step; with fused and with explicit attention; see `saved_activations`.
        peak: bytes that the accelerator had allocated at most during a step; None on a CPU.
    """

    gmacs: float
    step_s: float
    fused: int
    explicit: int
    peak: int | None


def family(
    backbone: str,
    blocks: tuple[int, ...],
    decoder: DecoderSpec,
    target: TargetSpec | None = None,
    **args: Any,
) -> FamilySpec:
    """A family of equal decoders and targets. args: model_args, encode."""
    return FamilySpec(
        backbone=backbone,
        blocks=blocks,
        mask_ratios=(MASK_RATIO,) * len(blocks),
        decoders=(decoder,) * len(blocks),
        targets=(target or TargetSpec(),) * len(blocks),
        **({"model_args": {}} | args),
    )


def methods(backbone: str, layers: tuple[int, ...]) -> list[Method]:
    """The methods of papers.md on one backbone, ordinary MAE first. layers: of the family's blocks.

    The small size is 128, or the next below that holds whole mask units; HOG's cells are 8 pixels, or the next below that
    divide a unit.
    """
    whole, unit = (sum(layers),), open_backbone(backbone, layers, {}).mask_unit_px
    size = max(unit, 128 // unit * unit)
    cell = next(cell for cell in range(8, 0, -1) if unit % cell == 0)
    thrown, small_thrown = replace(MAE_DECODER, throw_ratio=0.5), replace(SMALL_DECODER, throw_ratio=0.5)
    hog, low = TargetSpec("hog", {"cell": cell}), {"img_size": size}
    k = f"K={len(layers)}"
    return [
        Method("MAE", family(backbone, whole, MAE_DECODER), "1"),
        Method("PR-MIM 0.5", family(backbone, whole, thrown), "MACs 0.72, memory 0.64"),
        Method(f"BIM {k}", family(backbone, layers, MAE_DECODER)),
        Method(f"BIM {k} + PR-MIM 0.5", family(backbone, layers, thrown)),
        Method(
            f"FastMIM {size}, HOG",
            family(backbone, whole, SMALL_DECODER, hog, model_args=low, encode="all"),
            "time of an epoch 0.59, memory 0.34",
        ),
        Method(
            f"BIM {k} + PR-MIM 0.5, HOG, {size}, 1x256",
            family(backbone, layers, small_thrown, hog, model_args=low),
        ),
    ]


def forward_gmacs(spec: FamilySpec) -> float:
    """Multiply-accumulates / 1e9 of the forward passes of one image through all blocks and decoders."""
    backbone = backbone_of(spec)
    return forward_gflops(spec, backbone, backbone.image_size) / 2


def step_seconds(
    spec: FamilySpec, batch: int, device: torch.device, precision: Precision, steps: int
) -> tuple[float, int | None]:
    """Seconds of the fastest of `steps` training steps of `batch` random images, all blocks one after the other.

    Masks are planned outside the clock: a run does that on a thread of its own during the step before. See `plan_seconds`.
    Also the most bytes that were allocated on an accelerator meanwhile; None on a CPU.
    """
    backbone = backbone_of(spec)
    optim = replace(spec.optim, precision=precision)
    trainers = [
        BlockTrainer(build_local_mim(spec, k, backbone), k, optim, device) for k in range(len(spec.blocks))
    ]
    images = torch.rand(batch, 3, *backbone.image_size, generator=torch.Generator().manual_seed(0)).to(device)
    times = []
    for step in range(steps + 1):  # the first one warms up
        if device.type == "cuda" and step == 1:
            torch.cuda.reset_peak_memory_stats(device)
        plans = plans_of_step(spec, backbone, backbone.image_size, batch, step, 0, device=device)
        started = _now(device)
        x = images
        for k, trainer in enumerate(trainers):
            y, _ = trainer.train_step(x, images, plans[k], step=step, lr=1e-4)
            x = y.float()
        times.append(_now(device) - started)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return min(times[1:]), peak


def cost(spec: FamilySpec, batch: int, device: torch.device, precision: Precision, steps: int) -> Cost:
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
    spec: FamilySpec, batch: int, device: torch.device, precision: Precision, steps: int
) -> tuple[float, int, int | None]:
    """The encoder alone, of a family of one block: seconds of the fastest forward and backward pass, bytes of activations
    held for the backward pass (counted on the CPU, in that precision), and the most bytes that were allocated on an
    accelerator. Masks are planned outside the clock, as in `step_seconds`."""
    backbone = backbone_of(spec)
    block, size = backbone.build_block(0, spec.seed).train(), backbone.image_size
    images = torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(0))

    def count(number: int) -> list[int]:
        some = torch.rand(number, 3, *size, generator=torch.Generator().manual_seed(0))
        plan = plans_of_step(spec, backbone, size, number, 0, 0)[0]
        with counting_saved(iter(block.parameters())) as saved, autocast("cpu", precision):
            block(some, plan)
        return [saved.total]

    (held,) = growing(count, batch)
    block, images, times = block.to(device), images.to(device), []
    for step in range(steps + 1):  # the first one warms up
        if device.type == "cuda" and step == 1:
            torch.cuda.reset_peak_memory_stats(device)
        plan = plans_of_step(spec, backbone, size, batch, step, 0, device=device)[0]
        started = _now(device)
        with autocast(device.type, precision):
            tokens = block(images, plan)
        tokens.float().square().mean().backward()
        block.zero_grad(set_to_none=True)
        times.append(_now(device) - started)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return min(times[1:]), held, peak


def plan_seconds(spec: FamilySpec, batch: int, steps: int) -> float:
    """Seconds of the median of `steps` plans of all blocks for a batch on the CPU, which a run makes ahead of the step."""
    backbone = backbone_of(spec)
    times = []
    for step in range(steps):
        started = time.perf_counter()
        plans_of_step(spec, backbone, backbone.image_size, batch, step, 0)
        times.append(time.perf_counter() - started)
    return median(times)


def sampler_seconds(
    spec: FamilySpec, batch: int, steps: int, throw_ratio: float
) -> list[tuple[tuple[int, int], dict[str, float]]]:
    """For each block (rows, columns) of its tokens, and by sampler the median seconds of choosing, for a batch on the CPU,
    which of them are decoded. Raises ValueError if `throw_ratio` leaves a decoder no masked token."""
    backbone = backbone_of(spec)
    plans = plans_of_step(spec, backbone, backbone.image_size, batch, 0, 0)

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


def light_decoders(spec: FamilySpec) -> FamilySpec:
    """The same family with decoders that cost less where there are many tokens: on grids of more than 28 x 28 a width of 64
    and 0.65 of all tokens thrown, on more than 14 x 14 a width of 128 and half of them, thrown ones not recovered and drawn
    at random."""
    found = []
    for info, decoder in zip(backbone_of(spec).blocks, spec.decoders, strict=True):
        tokens = info.grid[0] * info.grid[1]
        for least, dim, throw in ((28 * 28, 64, 0.65), (14 * 14, 128, 0.5)):
            if tokens > least:
                decoder = replace(decoder, dim=dim, throw_ratio=throw, recovery="none", sampler="random")
                break
        found.append(decoder)
    return replace(spec, decoders=tuple(found))


@contextmanager
def explicit_attention() -> Iterator[None]:
    """Inside, timm builds attention that keeps its N x N weights, as before fused kernels."""
    before = timm.layers.use_fused_attn()
    timm.layers.set_fused_attn(False)
    try:
        yield
    finally:
        timm.layers.set_fused_attn(bool(before))


def depth_runs(backbone: str, layers: tuple[int, ...], decoder: DecoderSpec) -> list[FamilySpec]:
    """What a family replaces: an ordinary end-to-end run for each of its depths."""
    whole = open_backbone(backbone, layers, {})
    found = []
    for info in whole.blocks:
        args = {key: v for key, v in whole.variant_args(info.depth).items() if key not in RESERVED_ARGS}
        found.append(family(backbone, (info.depth,), decoder, model_args=args))
    return found


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
