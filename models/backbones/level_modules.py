"""Modules made of the levels of a timm pyramid: a block to train, the first levels alone, a pooled feature map.

They run timm's modules under timm's names; `dense.py` decides which ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from bim.models.backbones.mask_fill import MaskFill
from bim.models.masks.plan import MaskPlan

# The prefix of timm's names in the state dict of a block.
PARTS = "parts."


class DenseBlock(nn.Module):
    """Consecutive levels of a timm pyramid; the first block takes images, the others tokens of the previous block.

    parts: timm's modules by their paths, named so below `parts`. scale: tokens per side of a mask unit in the input.
    opening: modules that end the previous level in timm and are applied to the tokens.
    """

    def __init__(
        self,
        parts: Mapping[str, nn.Module],
        channels_last: bool,
        scale: int,
        mask_fill: MaskFill | None = None,
        opening: Mapping[str, nn.Module] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.paint = mask_fill  # the name in checkpoints
        self.parts = nn.Module()
        add_modules(self.parts, {**opening, **parts})
        self.opening = tuple(opening)
        self.chain = tuple(parts)
        self.channels_last = channels_last
        self.scale = scale

    def forward(self, x: Tensor, plan: MaskPlan) -> Tensor:
        """x: images (B, 3, H, W), or tokens (B, h' * w', C'), row by row -> (B, h * w, C), row by row.

        Raises ValueError if x does not fit the plan's grid.
        """
        if self.paint is not None:
            x = self.paint(x, plan)
        else:
            grid = (plan.grid[0] * self.scale, plan.grid[1] * self.scale)
            if x.shape[1] != grid[0] * grid[1]:
                raise ValueError(
                    f"{x.shape[1]} tokens are not the {grid[0]} x {grid[1]} of the plan's {plan.grid[0]} x {plan.grid[1]} "
                    "units"
                )
            x = run_chain(self.parts.get_submodule, self.opening, x)
            x = to_map(x, grid, self.channels_last)
        return to_tokens(run_chain(self.parts.get_submodule, self.chain, x), self.channels_last)


class LevelsOnly(nn.Module):
    """The first levels of a timm pyramid whose class cannot be built without the others.

    It has `forward_features` (the last level's map), `forward_head` and `forward` (the mean of the map) as a timm model
    that embeds. Modules have timm's names, so that the weights fit timm's `features_only` model.
    """

    def __init__(self, model: Any, paths: Sequence[str], width: int, channels_last: bool) -> None:
        super().__init__()
        self.chain = tuple(paths)
        add_modules(self, {path: model.get_submodule(path) for path in self.chain})
        self.channels_last = channels_last
        self.num_features = width
        self.pretrained_cfg: dict[str, Any] = dict(model.pretrained_cfg)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> the map (B, C, h, w), or (B, h, w, C) for timm classes with channels last."""
        return run_chain(self.get_submodule, self.chain, x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The map -> (B, C), its mean; `pre_logits` has no effect without a classifier."""
        return to_tokens(x, self.channels_last).mean(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C)."""
        return self.forward_head(self.forward_features(x))


class PooledMap(nn.Module):
    """timm's `features_only` model of one map, with the mean of that map as its output (B, C)."""

    def __init__(self, model: nn.Module, channels_last: bool) -> None:
        super().__init__()
        self.model = model
        self.channels_last = channels_last

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C)."""
        (feature,) = self.model(x)
        return to_tokens(feature, self.channels_last).mean(dim=1)


def to_map(tokens: Tensor, grid: tuple[int, int], channels_last: bool) -> Tensor:
    """(B, h * w, C), row by row -> (B, h, w, C) or (B, C, h, w)."""
    return (
        tokens.unflatten(1, grid) if channels_last else tokens.transpose(1, 2).unflatten(2, grid).contiguous()
    )


def to_tokens(feature: Tensor, channels_last: bool) -> Tensor:
    """(B, h, w, C) or (B, C, h, w) -> (B, h * w, C), row by row."""
    return feature.flatten(1, 2) if channels_last else feature.flatten(2).transpose(1, 2).contiguous()


def add_modules(root: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Register modules at dotted paths below `root`, with plain modules as parents, so that names stay timm's."""
    for path, module in modules.items():
        names = path.split(".")
        for parent in (".".join(names[:length]) for length in range(1, len(names))):
            if parent not in dict(root.named_modules()):
                root.set_submodule(parent, nn.Module())
        root.set_submodule(path, module)


def run_chain(get_module: Callable[[str], nn.Module], paths: Sequence[str], x: Tensor) -> Tensor:
    """Apply the modules at `paths` one after the other; shapes are those of the modules."""
    for path in paths:
        x = get_module(path)(x)
    return x
