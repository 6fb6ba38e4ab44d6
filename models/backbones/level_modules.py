"""Modules made of the levels of a timm pyramid: a block to train, the first levels alone, a feature map pooled.

They run timm's own modules under timm's own names; which ones belong where is decided in `dense.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from bim.models.backbones.paint import Paint
from bim.models.masks.plan import MaskPlan

# Where a block keeps timm's modules; what follows in a key is timm's name.
PARTS = "parts."


class DenseBlock(nn.Module):
    """Consecutive levels of a timm pyramid; the first block takes images, the others the tokens of the block before.

    Modules are named as in timm below `parts`. scale: tokens per side of a mask unit in what it takes; unit: pixels per
    side of one. opening: a norm that in timm ends the level before, and that works on tokens.
    """

    def __init__(
        self,
        parts: Mapping[str, nn.Module],
        channels_last: bool,
        scale: int,
        paint: Paint | None = None,
        opening: tuple[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.paint = paint
        self.parts = nn.Module()
        for path, module in ((opening,) if opening else ()) + tuple(parts.items()):
            place(self.parts, path, module)
        self.opening = opening[0] if opening else None
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
            if self.opening is not None:
                x = self.parts.get_submodule(self.opening)(x)
            x = to_map(x, grid, self.channels_last)
        return to_tokens(run_chain(self.parts.get_submodule, self.chain, x), self.channels_last)


class LevelsOnly(nn.Module):
    """The first levels of a timm pyramid whose class cannot be built without the others.

    Has what is asked of a timm model that embeds: `forward_features` (the last level's map), `forward_head` and `forward`
    (its mean over places). Modules are named as in timm, so that the weights fit timm's `features_only` model.
    """

    def __init__(self, model: Any, paths: Sequence[str], width: int, channels_last: bool) -> None:
        super().__init__()
        self.chain = tuple(paths)
        for path in self.chain:
            place(self, path, model.get_submodule(path))
        self.channels_last = channels_last
        self.num_features = width
        self.pretrained_cfg: dict[str, Any] = dict(model.pretrained_cfg)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> the map (B, C, h, w), or (B, h, w, C) where timm's class has it so."""
        return run_chain(self.get_submodule, self.chain, x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The map -> (B, C), its mean; there is no classifier that `pre_logits` could leave out."""
        return to_tokens(x, self.channels_last).mean(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C)."""
        return self.forward_head(self.forward_features(x))


class PooledMap(nn.Module):
    """timm's `features_only` model of one map, with that map's mean over places as its output (B, C)."""

    def __init__(self, model: nn.Module, channels_last: bool) -> None:
        super().__init__()
        self.model = model
        self.channels_last = channels_last

    def forward(self, x: Tensor) -> Tensor:
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


def place(root: nn.Module, path: str, module: nn.Module) -> None:
    """Register `module` below `root` at a dotted path, with plain modules in between, so that names stay timm's."""
    *outer, last = path.split(".")
    for name in outer:
        if name not in dict(root.named_children()):
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    root.add_module(last, module)


def run_chain(part: Callable[[str], nn.Module], paths: Sequence[str], x: Tensor) -> Tensor:
    for path in paths:
        x = part(path)(x)
    return x
