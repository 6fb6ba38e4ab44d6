"""Records of what a run trains, sent to every stage; `runs/resolve.py` makes them from the settings.

Two processes with equal records build equal weights and equal masks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class OptimSpec:
    """AdamW as in MAE; the learning rate comes with every step.

    `clip_grad` bounds the gradient norm of each block (None: no clipping).
    """

    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip_grad: float | None = None
    precision: Precision = "fp32"


@dataclass(frozen=True)
class DecoderSpec:
    """The local decoder of one block.

    Args:
        num_heads: None: one head per 32 channels (512 / 16 in MAE).
        throw_ratio: fraction of all tokens that no decoder layer sees (PR-MIM); 0: none.
        recovery: "none" leaves thrown tokens out, "aggregate" predicts them from decoded neighbors.
        sampler: chooses the tokens to decode, see `bim.models.masks.sampling`.
        thrown_weight: weight of a thrown token in the loss.
        name: in `bim.models.decoders.DECODERS`; "auto": as the backbone encodes.
    """

    depth: int
    dim: int
    num_heads: int | None = None
    throw_ratio: float = 0.0
    recovery: str = "none"
    sampler: str = "furthest"
    thrown_weight: float = 1.0
    name: str = "auto"


@dataclass(frozen=True)
class TargetSpec:
    """The target of one block's decoder: a name in `bim.models.targets.TARGETS` and its keyword arguments."""

    name: str = "pixels"
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PretrainSpec:
    """What a stage needs to build and train its blocks; tuples have one entry per block."""

    backbone: str
    model_args: dict[str, Any]
    blocks: tuple[int, ...]
    mask_ratios: tuple[float, ...]
    decoders: tuple[DecoderSpec, ...]
    targets: tuple[TargetSpec, ...] = ()
    """One per block; () means normalized pixels in every block."""
    encode: str = "auto"
    """Tokens that an encoder block computes, "visible" or "all"; see `bim.models.backbones.open_backbone`."""
    mask_per_batch: bool | None = None
    """Whether the samples of a micro-batch share one mask; None: the backbone's default (Swin and Twins: yes)."""
    sweep_groups: bool = False
    """Whether every window group size is tried (Swin and Twins), see `bim.models.masks.window_groups`."""
    boundary_noise: float = 0.0
    """Standard deviation of the noise on the input of later blocks, relative to that of the input."""
    loss_on_newly_masked: bool = True
    """Whether the loss of a later block counts the units that the first block saw and this one does not."""
    seed: int = 0
    init_from: str | None = None
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    optim: OptimSpec = field(default_factory=OptimSpec)
    plugins: tuple[str, ...] = ()
    """Modules that register what the names above mean, see `bim.orchestrator.plugins`."""
