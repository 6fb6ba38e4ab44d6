"""One block, its decoder and its loss, with the gradient cut at both ends: this is block-wise MIM (BIM,
papers.md 1.2).

Knows no optimizer, no precision and no place: `orchestrator/block_trainer.py` trains it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.masking import MaskPlan
from models.targets import Target
from models.tokens import gather_tokens


@dataclass(frozen=True, eq=False)
class LocalStep:
    """What one forward pass of a block yields.

    activations: (B, P + Nv, D), the block's residual stream, un-normalised and detached, for the next block.
    loss: scalar; its backward reaches this block and this decoder and nothing else.
    parts: detached scalars, "loss_always_masked" and, where this block drops units that the first block saw,
        "loss_newly_dropped"; their averages weighted by the numbers of units give the loss over all masked
        units.
    """

    activations: Tensor
    loss: Tensor
    parts: dict[str, Tensor]


class LocalMIM(nn.Module):
    """A block that is trained by its own masked-image loss.

    encoder: (x, plan) -> (B, P + Nv, D), from `Backbone.build_block`; of block 0 it takes the images
    themselves. decoder: (tokens, plan) -> (B, Nm, out_dim), predictions of `plan.masked`. target: images ->
    (B, N, out_dim). score_newly_dropped: whether units that the first block saw, and that are hence partly
    leaked, count in the loss.
    """

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module, target: Target, score_newly_dropped: bool = True
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.target = target
        self.score_newly_dropped = score_newly_dropped

    def forward(self, x: Tensor, images: Tensor, plan: MaskPlan) -> LocalStep:
        """x: (B, P + N', D) tokens of the block before, in the plan's order, or the images for block 0.

        images: (B, 3, H, W) normalised float, from which the target is made.
        """
        tokens = self.encoder(x.detach(), plan)
        masked = plan.masked
        predicted = self.decoder(tokens, plan)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            wanted = gather_tokens(self.target(images.float()), masked)
        # In float32 whatever the decoder's precision: squares of half-precision errors underflow.
        errors = (predicted.float() - wanted).square().mean(dim=-1)  # (B, Nm)

        if plan.visible == plan.first_visible:
            loss = errors.mean()
            parts = {"loss_always_masked": loss.detach()}
        else:
            dropped = plan.newly_dropped(masked)
            always, newly = average(errors, ~dropped), average(errors, dropped)
            loss = errors.mean() if self.score_newly_dropped else always
            parts = {"loss_always_masked": always.detach(), "loss_newly_dropped": newly.detach()}
        return LocalStep(activations=tokens.detach(), loss=loss, parts=parts)


def average(values: Tensor, chosen: Tensor) -> Tensor:
    """The mean of `values` where `chosen` (bool, same shape, at least one True), without a wait for the device."""
    return (values * chosen).sum() / chosen.sum()
