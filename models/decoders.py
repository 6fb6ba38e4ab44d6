"""Decoders: the tokens of one block -> predictions for its masked units.

A decoder is private to its block and is thrown away after pretraining, all but its first norm, which becomes
the final norm of the exported depth variant. It knows nothing of images, targets or losses.
"""

from __future__ import annotations

from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from models.initialisation import TOKEN_STD, mae_init_
from models.masking import MaskPlan
from models.tokens import sincos_positions

# Head width when num_heads is left open: MAE's 512-wide decoder has 16 heads.
HEAD_DIM = 32


class LocalDecoder(nn.Module):
    """MAE's decoder for one block, with its own norm, mask token and fixed sin-cos positions.

    in_dim: width D of the encoder's tokens. dim, depth, num_heads: of the decoder's layers (`num_heads` None:
    one per 32 of width). grid: (rows, columns) of units. out_dim: values predicted per unit.
    num_prefix_tokens: class and register tokens in front of the units' tokens. norm_eps: of every LayerNorm
    (timm's `Block` default would be 1e-5).

    Parameters are drawn from torch's global CPU generator: build it inside `seeding.forked_rng`.
    Raises ValueError if dim is no multiple of 4 (positions) or of num_heads, or if depth is below 1.
    """

    positions: Tensor

    def __init__(
        self,
        in_dim: int,
        dim: int,
        depth: int,
        num_heads: int | None,
        grid: tuple[int, int],
        out_dim: int,
        num_prefix_tokens: int,
        norm_eps: float = 1e-6,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        heads = decoder_heads(dim, depth, num_heads)
        layer_norm = partial(nn.LayerNorm, eps=norm_eps)
        self.num_prefix_tokens = num_prefix_tokens
        self.norm = layer_norm(in_dim)
        self.embed = nn.Linear(in_dim, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        # Computed from the grid, hence not saved. Row N, all zero, is the position of the prefix tokens.
        table = torch.cat([sincos_positions(dim, grid), torch.zeros(1, dim)])
        self.register_buffer("positions", table, persistent=False)
        self.layers = nn.Sequential(
            *(Block(dim, heads, mlp_ratio, qkv_bias=True, norm_layer=layer_norm) for _ in range(depth))
        )
        self.out_norm = layer_norm(dim)
        self.head = nn.Linear(dim, out_dim)
        mae_init_(self)
        nn.init.normal_(self.mask_token, std=TOKEN_STD)

    def decode(self, x: Tensor, plan: MaskPlan) -> Tensor:
        """x: (B, P + Nv, in_dim) un-normalised tokens of the block -> (B, P + Nv + Nd, dim), after the last
        norm.

        Tokens stay in the plan's order, the decoded units last: attention does not mind the order, and
        nothing has to be put back in place.
        """
        prefix = plan.order.new_full((x.shape[0], self.num_prefix_tokens), self.positions.shape[0] - 1)
        places = torch.cat([prefix, plan.keep, plan.decode], dim=1)
        visible = self.embed(self.norm(x))
        masks = self.mask_token.expand(x.shape[0], plan.decode.shape[1], -1)
        tokens = torch.cat([visible, masks], dim=1) + self.positions[places]
        decoded: Tensor = self.out_norm(self.layers(tokens))
        return decoded

    def forward(self, x: Tensor, plan: MaskPlan) -> Tensor:
        """x: (B, P + Nv, in_dim) -> (B, Nd, out_dim), the predictions for `plan.masked`, in its order."""
        predictions: Tensor = self.head(self.decode(x, plan)[:, x.shape[1] :])
        return predictions


def decoder_heads(dim: int, depth: int, num_heads: int | None) -> int:
    """The number of attention heads of a decoder, its size checked; see `LocalDecoder`."""
    if depth < 1:
        raise ValueError(
            f"decoder.depth is {depth}; it must be at least 1, or masked units would see nothing"
        )
    if dim < 4 or dim % 4:
        raise ValueError(f"decoder.dim is {dim}; it must be a multiple of 4 for its sin-cos positions")
    heads = max(1, dim // HEAD_DIM) if num_heads is None else num_heads
    if heads < 1 or dim % heads:
        asked = "the default" if num_heads is None else "decoder.num_heads"
        raise ValueError(
            f"decoder.dim {dim} is not divisible by {heads} heads ({asked}); set decoder.num_heads"
        )
    return heads
