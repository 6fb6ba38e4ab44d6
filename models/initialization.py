"""Initialization of transformer parameters as in MAE (arXiv 2111.06377), for encoder blocks and decoders."""

from __future__ import annotations

import torch
from torch import nn

# MAE's standard deviation for the class, register and mask tokens.
TOKEN_STD = 0.02


def scale_head_init_(head: nn.Linear, gain: float, bias: float) -> None:
    """Scale a new head in place so that its first predictions are near the target; see `targets.Target.head_init`."""
    with torch.no_grad():
        head.weight.mul_(gain)
        head.bias.fill_(bias)


def mae_init_(module: nn.Module) -> None:
    """Initialize all linear layers and patch embeddings below `module` in place, from torch's global CPU generator.

    Weights are Xavier-uniform, a convolution's as those of the linear map of a flattened patch; biases are zero. Norms and
    LayerScales are unchanged. Call it inside `seeding.forked_rng`.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight.view(layer.weight.shape[0], -1))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
