"""What a family of backbones is, as plain values, and how its blocks and masks are made from them.

Sent to every stage as it is; two places that hold equal values build equal weights and equal masks. Knows no Ray, MLflow or
pydantic: `resolve.py` makes it from the settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from models.backbones import open_backbone
from models.backbones.backbone import Backbone
from models.decoders import LocalDecoder
from models.initialisation import start_near_
from models.light_decoder import LightDecoder
from models.local_mim import LocalMIM
from models.masking import MaskPlan, block_plans, partial_plan, random_order, visible_counts
from models.seeding import forked_rng, generator
from models.targets import TARGETS
from orchestrator.block_trainer import OptimSpec


@dataclass(frozen=True)
class DecoderSpec:
    """One block's local decoder; `num_heads` None means one head per 32 channels (MAE's 512/16).

    Args:
        throw_ratio: share of all tokens that no decoder layer sees (PR-MIM); 0: plain.
        recovery: "aggregate" predicts thrown tokens from decoded neighbours, "none" leaves them out.
        sampler: how the tokens that are decoded are chosen, see `models.sampling`.
        thrown_weight: of a thrown token in the loss.
    """

    depth: int
    dim: int
    num_heads: int | None = None
    throw_ratio: float = 0.0
    recovery: str = "aggregate"
    sampler: str = "furthest"
    thrown_weight: float = 1.0


@dataclass(frozen=True)
class TargetSpec:
    """What one block's decoder predicts: a name in `models.targets.TARGETS` and its keywords."""

    name: str = "pixels"
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FamilySpec:
    """Everything that a stage needs to build and train its blocks: plain values, lists already one entry per block."""

    backbone: str
    model_args: dict[str, Any]
    blocks: tuple[int, ...]
    mask_ratios: tuple[float, ...]
    decoders: tuple[DecoderSpec, ...]
    targets: tuple[TargetSpec, ...] = ()
    """One per block; () means normalised pixels in every block."""
    encode: str = "auto"
    """What an encoder block computes: "visible" tokens or "all"; see `models.backbones.open_backbone`."""
    mask_per_batch: bool | None = None
    """Whether the samples of a micro-batch share one mask; None: as the backbone family does (Swin and Twins: yes)."""
    sweep_groups: bool = False
    """Whether every size of window groups is tried (Swin and Twins), see `models.window_groups`."""
    boundary_noise: float = 0.0
    """Noise on what enters a later block, in standard deviations of it."""
    score_newly_dropped: bool = True
    seed: int = 0
    init_from: str | None = None
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    optim: OptimSpec = field(default_factory=OptimSpec)


def build_local_mim(spec: FamilySpec, index: int, backbone: Backbone | None = None) -> LocalMIM:
    """Block `index` with its decoder and loss; its initial weights depend on (spec.seed, index) alone."""
    backbone = backbone or backbone_of(spec)
    info, how = backbone.blocks[index], spec.decoders[index]
    encoder = backbone.build_block(index, spec.seed, spec.init_from)
    wanted = spec.targets[index] if spec.targets else TargetSpec()
    target = TARGETS[wanted.name](info.stride, **wanted.args)
    sizes: dict[str, Any] = {
        "in_dim": info.width,
        "dim": how.dim,
        "depth": how.depth,
        "num_heads": how.num_heads,
        "out_dim": target.out_dim,
        "num_prefix_tokens": info.num_prefix_tokens,
        "norm_eps": backbone.norm_eps,
    }
    decoder: LocalDecoder | LightDecoder
    with forked_rng(spec.seed, "decoder", index):
        if backbone.encode == "all":
            decoder = LightDecoder(**sizes)
        else:
            decoder = LocalDecoder(**sizes, recovery=how.recovery if how.throw_ratio else "none")
    start_near_(decoder.head, *target.start)
    return LocalMIM(encoder, decoder, target, spec.score_newly_dropped, how.thrown_weight)


def backbone_of(spec: FamilySpec) -> Backbone:
    """The family's backbone, cut into its blocks."""
    return open_backbone(spec.backbone, spec.blocks, spec.model_args, spec.encode)


def plans_of_step(
    spec: FamilySpec,
    backbone: Backbone,
    size: tuple[int, int],
    batch: int,
    step: int,
    micro: int,
    blocks: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> dict[int, MaskPlan]:
    """The mask plan of each of `blocks` (None: all) for one micro-batch of images of `size` (height, width), on `device`.

    A function of (seed, step, micro), the same wherever it is computed, and at any time before the step.
    """
    grid = backbone.grid_at(size)
    units = grid[0] * grid[1]
    shared = backbone.mask_per_batch_default if spec.mask_per_batch is None else spec.mask_per_batch
    order = random_order(batch, units, generator(spec.seed, "mask", step, micro), shared)
    scales = [backbone.unit // info.stride for info in backbone.blocks]
    plans = block_plans(order, grid, visible_counts(units, spec.mask_ratios), scales, shared)
    wanted = range(len(plans)) if blocks is None else blocks
    found = {}
    for k, plan in backbone.prepared({k: plans[k] for k in wanted}, spec.sweep_groups).items():
        how, gen = spec.decoders[k], generator(spec.seed, "decode", step, micro, k)
        # Drawn on the CPU: many small steps, which on a GPU would queue among those of the training.
        found[k] = partial_plan(plan, how.throw_ratio, how.sampler, gen).to(device)
    return found
