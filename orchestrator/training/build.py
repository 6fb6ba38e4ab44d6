"""What a family of backbones is, as plain values, and how its blocks and masks are made from them.

Sent to every stage as it is; two places that hold equal values build equal weights and equal masks. Knows no Ray, MLflow or
pydantic: `resolve.py` makes it from the settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bim.models.backbones import open_backbone
from bim.models.backbones.backbone import Backbone
from bim.models.decoders.light import LightDecoder
from bim.models.decoders.local import LocalDecoder
from bim.models.initialization import scale_head_init_
from bim.models.local_mim import LocalMIM
from bim.models.masks.plan import MaskPlan, block_plans, partial_plan, random_permutation, visible_counts
from bim.models.seeding import forked_rng, generator
from bim.models.targets import TARGETS
from bim.orchestrator.training.spec import PretrainSpec, TargetSpec


def build_local_mim(spec: PretrainSpec, index: int, backbone: Backbone | None = None) -> LocalMIM:
    """Block `index` with its decoder and loss; its initial weights depend on (spec.seed, index) alone."""
    backbone = backbone or open_spec_backbone(spec)
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
    scale_head_init_(decoder.head, *target.head_init)
    return LocalMIM(encoder, decoder, target, spec.score_newly_dropped, how.thrown_weight)


def open_spec_backbone(spec: PretrainSpec) -> Backbone:
    """The family's backbone, cut into its blocks."""
    return open_backbone(spec.backbone, spec.blocks, spec.model_args, spec.encode)


def mask_plans(
    spec: PretrainSpec,
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
    order = random_permutation(batch, units, generator(spec.seed, "mask", step, micro), shared)
    scales = [backbone.mask_unit_px // info.stride for info in backbone.blocks]
    plans = block_plans(order, grid, visible_counts(units, spec.mask_ratios), scales, shared)
    wanted = range(len(plans)) if blocks is None else blocks
    found = {}
    for k, plan in backbone.prepare_plans({k: plans[k] for k in wanted}, spec.sweep_groups).items():
        how, gen = spec.decoders[k], generator(spec.seed, "decode", step, micro, k)
        # Drawn on the CPU: many small steps, which on a GPU would queue among those of the training.
        found[k] = partial_plan(plan, how.throw_ratio, how.sampler, gen).to(device)
    return found
