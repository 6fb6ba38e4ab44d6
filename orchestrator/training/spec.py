"""What a run trains, as plain values: sent to every stage as they are.

Two processes that hold equal values build equal weights and equal masks. `runs/resolve.py` makes them from the settings.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class OptimSpec:
    """AdamW as MAE uses it; the learning rate comes with every step.

    `clip_grad` bounds the gradient norm of each block by itself (None: no clipping).
    """

    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip_grad: float | None = None
    precision: Precision = "fp32"


@dataclass(frozen=True)
class DecoderSpec:
    """One block's local decoder; `num_heads` None means one head per 32 channels (MAE's 512/16).

    Args:
        throw_ratio: share of all tokens that no decoder layer sees (PR-MIM); 0: plain.
        recovery: "aggregate" predicts thrown tokens from decoded neighbours, "none" leaves them out.
        sampler: how the tokens that are decoded are chosen, see `bim.models.masks.sampling`.
        thrown_weight: of a thrown token in the loss.
    """

    depth: int
    dim: int
    num_heads: int | None = None
    throw_ratio: float = 0.0
    recovery: str = "aggregate"
    sampler: str = "furthest"
    thrown_weight: float = 1.0


@dataclass(frozen=True)
class TargetSpec:
    """What one block's decoder predicts: a name in `bim.models.targets.TARGETS` and its keywords."""

    name: str = "pixels"
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PretrainSpec:
    """Everything that a stage needs to build and train its blocks: plain values, lists already one entry per block."""

    backbone: str
    model_args: dict[str, Any]
    blocks: tuple[int, ...]
    mask_ratios: tuple[float, ...]
    decoders: tuple[DecoderSpec, ...]
    targets: tuple[TargetSpec, ...] = ()
    """One per block; () means normalised pixels in every block."""
    encode: str = "auto"
    """What an encoder block computes: "visible" tokens or "all"; see `bim.models.backbones.open_backbone`."""
    mask_per_batch: bool | None = None
    """Whether the samples of a micro-batch share one mask; None: as the backbone family does (Swin and Twins: yes)."""
    sweep_groups: bool = False
    """Whether every size of window groups is tried (Swin and Twins), see `bim.models.masks.window_groups`."""
    boundary_noise: float = 0.0
    """Noise on what enters a later block, in standard deviations of it."""
    score_newly_dropped: bool = True
    seed: int = 0
    init_from: str | None = None
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    optim: OptimSpec = field(default_factory=OptimSpec)
