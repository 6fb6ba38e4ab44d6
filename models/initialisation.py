"""MAE's initialisation of a transformer's parameters, for encoder blocks and decoders alike."""

from __future__ import annotations

from torch import nn

# MAE's standard deviation for the class, register and mask tokens.
TOKEN_STD = 0.02


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
