"""Depth variants of a trained checkpoint: weights of blocks 0..k assembled as a timm model."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from bim.models.backbones.backbone import Backbone
from bim.orchestrator.training.build import build_local_mim
from bim.orchestrator.training.spec import PretrainSpec


def trained_variant(backbone: Backbone, weights: list[dict[str, Tensor]], depth: int) -> nn.Module:
    """The first `depth` layers as a timm model.

    Args:
        weights: of every block, as `load_weights` returns them.

    The final norm is that of the decoder of the block in which `depth` ends; a K = 1 run truncated inside its only block
    keeps that run's final norm.
    """
    end = next(info.index for info in backbone.blocks if info.depth >= depth)
    encoders = [encoder_weights(state) for state in weights]
    return backbone.variant(depth, encoders, _part(weights[end], "decoder.norm."))


def encoder_weights(block: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's weights among those of a trained block, as `Backbone.variant` takes them."""
    return _part(block, "encoder.")


def random_variants(spec: PretrainSpec, backbone: Backbone, depths: tuple[int, ...]) -> dict[int, nn.Module]:
    """The same depths with the random weights of the spec's seed, without `init_from`."""
    spec = replace(spec, init_from=None)
    weights = [build_local_mim(spec, k, backbone).state_dict() for k in range(len(spec.blocks))]
    return {depth: trained_variant(backbone, weights, depth) for depth in depths}


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
