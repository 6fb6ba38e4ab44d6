"""One block, its decoder and its loss, with the gradient cut at both ends: this is block-wise MIM (BIM,
papers.md 1.2).

Knows no optimizer, no precision and no place: `orchestrator/block_trainer.py` trains it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bim.models.masks.plan import MaskPlan
from bim.models.precision import full_precision
from bim.models.targets import Target
from bim.models.tokens import gather_tokens


@dataclass(frozen=True, eq=False)
class LocalStep:
    """What one forward pass of a block yields.

    activations: the block's residual stream, un-normalised and detached, for the next block: (B, P + Nv, D).
    loss: scalar; its backward reaches this block and this decoder and nothing else.
    parts: detached scalars, each a plain mean of token errors. "loss_always_masked" and, where this block drops units
        that the first block saw, "loss_newly_dropped": their averages weighted by the numbers of tokens give the
        mean over all supervised tokens. Where thrown tokens were recovered, "loss_kept" and "loss_thrown" divide the
        same tokens the other way.
    """

    activations: Tensor
    loss: Tensor
    parts: dict[str, Tensor]


class LocalMIM(nn.Module):
    """A block that is trained by its own masked-image loss.

    encoder: (x, plan) -> (B, P + Nv, D), from `Backbone.build_block`; of block 0 it takes the images
    themselves. decoder: (tokens, plan) -> predictions of `plan.masked`, or of `plan.decode` alone if it does not recover
    thrown tokens, which are then not supervised. target: images -> (B, N, out_dim), N tokens of this block's grid.
    score_newly_dropped: whether units that the first block saw, and that are hence partly leaked, count in the loss.
    thrown_weight: weight w of a thrown token where a decoded one has 1, (Nd L_kept + w Nt L_thrown) / (Nd + w Nt).

    Raises ValueError if thrown_weight is negative or not finite.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        target: Target,
        score_newly_dropped: bool = True,
        thrown_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0.0 <= thrown_weight < math.inf:
            raise ValueError(
                f"decoder.thrown_weight is {thrown_weight}; it must be a finite number from 0 up"
            )
        self.encoder = encoder
        self.decoder = decoder
        self.target = target
        self.score_newly_dropped = score_newly_dropped
        self.thrown_weight = thrown_weight

    def targets(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W) normalised -> (B, N, out_dim) of all tokens, in float32 whatever the precision around."""
        with torch.no_grad(), full_precision(images.device):
            return self.target(images.float())

    def forward(self, x: Tensor, images: Tensor, plan: MaskPlan, targets: Tensor | None = None) -> LocalStep:
        """x: (B, P + N', D) tokens of the block before, in the plan's order, or the images for block 0.

        images: (B, 3, H, W) normalised float, from which the target is made. targets: `self.targets(images)`, if blocks
        with the same target share it.
        """
        tokens = self.encoder(x.detach(), plan)
        predicted = self.decoder(tokens, plan)
        kept = plan.decode.shape[1]
        assert predicted.shape[1] in (kept, plan.masked.shape[1])
        supervised = plan.masked[:, : predicted.shape[1]]  # decoded tokens come first
        recovered = supervised.shape[1] > kept
        wanted = gather_tokens(self.targets(images) if targets is None else targets, supervised)
        # In float32 whatever the decoder's precision: squares of half-precision errors underflow.
        errors = (predicted.float() - wanted).square().mean(dim=-1)  # (B, Ns)

        parts: dict[str, Tensor] = {}
        is_scored = None  # None: all
        if plan.visible == plan.first_visible:
            parts["loss_always_masked"] = errors.detach().mean()
        else:
            dropped = plan.newly_dropped(supervised)
            parts["loss_always_masked"] = average(errors.detach(), ~dropped)
            parts["loss_newly_dropped"] = average(errors.detach(), dropped)
            is_scored = None if self.score_newly_dropped else ~dropped
        if recovered:
            parts["loss_kept"] = errors.detach()[:, :kept].mean()
            parts["loss_thrown"] = errors.detach()[:, kept:].mean()

        if recovered and self.thrown_weight != 1.0:
            weights = torch.ones_like(errors)
            weights[:, kept:] = self.thrown_weight
            loss = average(errors, weights if is_scored is None else weights * is_scored)
        else:
            loss = errors.mean() if is_scored is None else average(errors, is_scored)
        return LocalStep(activations=tokens.detach(), loss=loss, parts=parts)


def average(values: Tensor, weights: Tensor) -> Tensor:
    """The mean of `values` weighted by `weights` (bool or float >= 0, same shape), without a wait for the device.

    Zero where nothing has a weight: a decoder without recovery may, by chance, have kept no token of one sort.
    """
    total = weights.sum(dtype=values.dtype)
    return (values * weights).sum() / total.where(total > 0, 1.0)
