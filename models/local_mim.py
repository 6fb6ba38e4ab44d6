"""One block with its decoder and its local loss, without gradients across block boundaries (BIM, arXiv 2311.17218).

Serves training code, which adds an optimizer, a precision and a device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bim.models.masks.plan import MaskPlan
from bim.models.precision import autocast_disabled
from bim.models.targets import Target
from bim.models.tokens import gather_tokens


@dataclass(frozen=True, eq=False)
class LocalStep:
    """The result of one forward pass of a block.

    activations: (B, P + Nv, D), the block's residual stream for the next block, unnormalized and detached.
    loss: scalar; its backward pass reaches this block and this decoder only.
    parts: detached scalars, each a mean of token errors. "loss_always_masked" and, where this block drops units that
        the first block saw, "loss_newly_masked" divide the supervised tokens in two. Where thrown tokens are
        recovered, "loss_kept" and "loss_thrown" divide the same tokens by the decoder's choice.
    """

    activations: Tensor
    loss: Tensor
    parts: dict[str, Tensor]


class LocalMIM(nn.Module):
    """A block trained by its own masked-image loss.

    encoder: (x, plan) -> (B, P + Nv, D), from `Backbone.build_block`; that of block 0 takes images.
    decoder: (tokens, plan) -> predictions of `plan.masked`, or of `plan.decode` if it does not recover thrown tokens,
        which are then not supervised.
    target: images -> (B, N, out_dim), N tokens of this block's grid.
    loss_on_newly_masked: whether units that the first block saw, which are partly leaked, count in the loss.
    thrown_weight: weight w of a thrown token, a decoded one having 1: (Nd L_kept + w Nt L_thrown) / (Nd + w Nt).

    Raises ValueError if thrown_weight is negative or not finite.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        target: Target,
        loss_on_newly_masked: bool = True,
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
        self.loss_on_newly_masked = loss_on_newly_masked
        self.thrown_weight = thrown_weight

    def targets(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W) normalized -> (B, N, out_dim) of all tokens, in float32 under any autocast."""
        with torch.no_grad(), autocast_disabled(images.device):
            return self.target(images.float())

    def forward(self, x: Tensor, images: Tensor, plan: MaskPlan, targets: Tensor | None = None) -> LocalStep:
        """x: (B, P + N', D) tokens of the previous block, in the plan's order, or the images for block 0.

        images: (B, 3, H, W) normalized float, for the target. targets: `self.targets(images)`, where blocks share them.
        """
        tokens = self.encoder(x.detach(), plan)
        predicted = self.decoder(tokens, plan)
        num_decoded = plan.decode.shape[1]
        assert predicted.shape[1] in (num_decoded, plan.masked.shape[1])
        supervised = plan.masked[:, : predicted.shape[1]]  # decoded tokens come first
        has_recovered = supervised.shape[1] > num_decoded
        expected = gather_tokens(self.targets(images) if targets is None else targets, supervised)
        # In float32 under any autocast: squares of half-precision errors underflow.
        errors = (predicted.float() - expected).square().mean(dim=-1)  # (B, Ns)

        parts: dict[str, Tensor] = {}
        in_loss = None  # None: all
        if plan.visible == plan.first_visible:
            parts["loss_always_masked"] = errors.detach().mean()
        else:
            dropped = plan.newly_masked(supervised)
            parts["loss_always_masked"] = average(errors.detach(), ~dropped)
            parts["loss_newly_masked"] = average(errors.detach(), dropped)
            in_loss = None if self.loss_on_newly_masked else ~dropped
        if has_recovered:
            parts["loss_kept"] = errors.detach()[:, :num_decoded].mean()
            parts["loss_thrown"] = errors.detach()[:, num_decoded:].mean()

        if has_recovered and self.thrown_weight != 1.0:
            weights = torch.ones_like(errors)
            weights[:, num_decoded:] = self.thrown_weight
            loss = average(errors, weights if in_loss is None else weights * in_loss)
        else:
            loss = errors.mean() if in_loss is None else average(errors, in_loss)
        return LocalStep(activations=tokens.detach(), loss=loss, parts=parts)


def average(values: Tensor, weights: Tensor) -> Tensor:
    """The mean of `values` weighted by `weights` (bool or float >= 0, same shape), without a device synchronization.

    Zero if all weights are zero: the tokens of one sort may all be thrown by chance.
    """
    total = weights.sum(dtype=values.dtype)
    return (values * weights).sum() / total.where(total > 0, 1.0)
