"""Initialization of transformer parameters as in MAE (arXiv 2111.06377), for encoder blocks and decoders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# MAE's standard deviation for the class, register and mask tokens.
TOKEN_STD = 0.02

_INITIALIZERS = frozenset(
    getattr(Tensor, name)
    for name in ("uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_")
) | {nn.init.uniform_, nn.init.normal_, nn.init.constant_, nn.init.kaiming_uniform_}
"""What reaches a mode of torch functions when timm and torch initialize a parameter; other functions call these."""


class NoInitialization(TorchFunctionMode):
    """Inside, modules are built without values: nothing that initializes parameters changes them.

    On the meta device this saves most of the time, since each of these operations runs in Python there. Elsewhere
    parameters hold whatever the memory held, which is good enough to count what a model costs.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _INITIALIZERS:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta or isinstance(tensor, nn.Parameter):
                return tensor
        return func(*args, **kwargs)


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
