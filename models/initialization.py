"""MAE's initialisation of a transformer's parameters, for encoder blocks and decoders alike."""

from __future__ import annotations

import torch
from torch import nn

# MAE's standard deviation for the class, register and mask tokens.
TOKEN_STD = 0.02


def start_near_(head: nn.Linear, gain: float, bias: float) -> None:
    """Bring the first predictions of a freshly initialised head near its target in place; see `targets.Target.start`."""
    with torch.no_grad():
        head.weight.mul_(gain)
        head.bias.fill_(bias)


def mae_init_(module: nn.Module) -> None:
    """Initialise all linear layers and patch embeddings below `module` in place, from torch's global CPU
    generator.

    Xavier-uniform weights, a convolution's taken as the linear map it is on a flattened patch, and zero
    biases. Norms and LayerScales keep the values they were built with. Call it inside `seeding.forked_rng`.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight.view(layer.weight.shape[0], -1))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
