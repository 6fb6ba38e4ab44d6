"""Blocks, backbone and mask plans of a `PretrainSpec`; equal specs build equal weights and equal masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bim.models.backbones import open_backbone
from bim.models.backbones.backbone import Backbone, BlockInfo
from bim.models.decoders import decoder_class
from bim.models.initialization import scale_head_init_
from bim.models.local_mim import LocalMIM
from bim.models.masks.plan import MaskPlan, block_plans, partial_plan, random_permutation, visible_counts
from bim.models.seeding import forked_rng, generator
from bim.models.targets import TARGETS
from bim.orchestrator.plugins import import_plugins
from bim.orchestrator.training.spec import PretrainSpec, TargetSpec


def build_local_mim(spec: PretrainSpec, index: int, backbone: Backbone | None = None) -> LocalMIM:
    """Block `index` with its decoder and loss; its initial weights depend only on (spec.seed, index).

    Raises PluginError if the spec's plugins cannot be imported.
    """
    import_plugins(spec.plugins)
    backbone = backbone or open_spec_backbone(spec)
    info = backbone.blocks[index]
    encoder = backbone.build_block(index, spec.seed, spec.init_from)
    target_spec = spec.targets[index] if spec.targets else TargetSpec()
    target = TARGETS[target_spec.name](info.stride, **target_spec.args)
    decoder = build_decoder(spec, info, backbone, target.out_dim)
    scale_head_init_(decoder.head, *target.head_init)
    return LocalMIM(encoder, decoder, target, spec.loss_on_newly_masked, spec.decoders[index].thrown_weight)


def build_decoder(spec: PretrainSpec, info: BlockInfo, backbone: Backbone, out_dim: int) -> Any:
    """The decoder of a block, a module that predicts `out_dim` values per token; see `bim.models.decoders.DECODERS`."""
    decoder = spec.decoders[info.index]
    sizes: dict[str, Any] = {
        "in_dim": info.width,
        "dim": decoder.dim,
        "depth": decoder.depth,
        "num_heads": decoder.num_heads,
        "out_dim": out_dim,
        "num_prefix_tokens": info.num_prefix_tokens,
        "norm_eps": backbone.norm_eps,
    }
    if decoder.throw_ratio and decoder.recovery != "none":
        sizes["recovery"] = decoder.recovery
    with forked_rng(spec.seed, "decoder", info.index):
        return decoder_class(decoder.name, backbone.encode)(**sizes)


def open_spec_backbone(spec: PretrainSpec) -> Backbone:
    """The backbone of a spec, split into its blocks. Raises PluginError if the spec's plugins cannot be imported."""
    import_plugins(spec.plugins)
    return open_backbone(spec.backbone, spec.blocks, spec.model_args, spec.encode)


def mask_plans(
    spec: PretrainSpec,
    backbone: Backbone,
    size: tuple[int, int],
    batch_size: int,
    step: int,
    micro_step: int,
    blocks: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> dict[int, MaskPlan]:
    """Block -> mask plan, of `blocks` (None: all), for one micro-batch of images of `size` (height, width).

    A pure function of its arguments, so that every stage computes the same plans at any time before the step.
    """
    grid = backbone.grid_at(size)
    units = grid[0] * grid[1]
    shared = backbone.mask_per_batch_default if spec.mask_per_batch is None else spec.mask_per_batch
    permutation = random_permutation(
        batch_size, units, generator(spec.seed, "mask", step, micro_step), shared
    )
    scales = [backbone.mask_unit_px // info.stride for info in backbone.blocks]
    plans = block_plans(permutation, grid, visible_counts(units, spec.mask_ratios), scales, shared)
    requested = {k: plans[k] for k in (range(len(plans)) if blocks is None else blocks)}
    for k, plan in backbone.prepare_plans(requested, spec.sweep_groups).items():
        decoder, gen = spec.decoders[k], generator(spec.seed, "decode", step, micro_step, k)
        # Sampling runs on the CPU: its many small kernels would delay the training on a GPU.
        requested[k] = partial_plan(plan, decoder.throw_ratio, decoder.sampler, gen).to(device)
    return requested
