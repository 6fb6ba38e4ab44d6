"""Decoders: the tokens of one block -> predictions for its masked tokens.

A decoder is private to its block and is thrown away after pretraining, all but its first norm, which becomes
the final norm of the exported depth variant. It knows nothing of images, targets or losses.
"""

from __future__ import annotations

from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from bim.models.decoders.recovery import NeighbourAggregation
from bim.models.initialization import TOKEN_STD, mae_init_
from bim.models.masks.plan import MaskPlan
from bim.models.tokens import sincos_positions

# Head width when num_heads is left open: MAE's 512-wide decoder has 16 heads.
HEAD_DIM = 32

# What becomes of thrown tokens: recovered from decoded neighbours, or neither predicted nor supervised.
RECOVERIES = ("none", "aggregate")


class LocalDecoder(nn.Module):
    """MAE's decoder for one block, with its own norm, mask token and fixed sin-cos positions; partial where the plan
    throws tokens (PR-MIM, papers.md 2.3).

    in_dim: width D of the encoder's tokens. dim, depth, num_heads: of the decoder's layers (`num_heads` None:
    one per 32 of width). out_dim: values predicted per token. num_prefix_tokens: class and register tokens in front
    of the others. norm_eps: of every LayerNorm (timm's `Block` default would be 1e-5). recovery: "aggregate" predicts
    thrown tokens from decoded neighbours, at the price of 9 parameters per channel; "none" leaves them out.

    Only visible and decoded tokens pass the layers, so that throwing saves time and memory. Any grid of tokens will do:
    positions come from the plan's. Parameters are drawn from torch's global CPU generator: build it inside
    `seeding.forked_rng`; `recovery` changes none of those draws.
    Raises ValueError if dim is no multiple of 4 (positions) or of num_heads, if depth is below 1 or recovery unknown.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        depth: int,
        num_heads: int | None,
        out_dim: int,
        num_prefix_tokens: int,
        norm_eps: float = 1e-6,
        mlp_ratio: float = 4.0,
        recovery: str = "none",
    ) -> None:
        super().__init__()
        heads = decoder_heads(dim, depth, num_heads)
        if recovery not in RECOVERIES:
            raise ValueError(f"decoder.recovery is '{recovery}'; it must be one of {', '.join(RECOVERIES)}")
        layer_norm = partial(nn.LayerNorm, eps=norm_eps)
        self.num_prefix_tokens = num_prefix_tokens
        self.norm = layer_norm(in_dim)
        self.embed = nn.Linear(in_dim, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.layers = nn.Sequential(
            *(Block(dim, heads, mlp_ratio, qkv_bias=True, norm_layer=layer_norm) for _ in range(depth))
        )
        self.out_norm = layer_norm(dim)
        self.head = nn.Linear(dim, out_dim)
        mae_init_(self)
        nn.init.normal_(self.mask_token, std=TOKEN_STD)
        self.recovery = NeighbourAggregation(dim) if recovery == "aggregate" else None
        # Computed from the grid, hence not saved; a run meets a handful of grids.
        self._positions: dict[tuple[tuple[int, int], torch.device, torch.dtype], Tensor] = {}

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """(N + 1, dim) for a grid of N tokens, where the parameters are; row N, all zero, is for prefix tokens."""
        like = self.mask_token
        key = (grid, like.device, like.dtype)
        if key not in self._positions:
            dim = like.shape[-1]
            self._positions[key] = torch.cat([sincos_positions(dim, grid), torch.zeros(1, dim)]).to(like)
        return self._positions[key]

    def decode(self, x: Tensor, plan: MaskPlan) -> Tensor:
        """x: (B, P + Nv, in_dim) un-normalised tokens of the block, in the order of `plan.keep_tokens` ->
        (B, P + Nv + Nd, dim), the layers' output before the last norm.

        Tokens stay in the plan's order, the decoded ones last: attention does not mind the order, and
        nothing has to be put back in place.
        """
        positions = self.positions(plan.token_grid)
        places = plan.once(torch.cat([plan.keep_tokens, plan.decode], dim=1))
        prefix = places.new_full((places.shape[0], self.num_prefix_tokens), positions.shape[0] - 1)
        places = torch.cat([prefix, places], dim=1)
        visible = self.embed(self.norm(x))
        masks = self.mask_token.expand(x.shape[0], plan.decode.shape[1], -1)
        decoded: Tensor = self.layers(torch.cat([visible, masks], dim=1) + positions[places])
        return decoded

    def recover(self, decoded: Tensor, plan: MaskPlan) -> Tensor:
        """decoded: (B, P + Nv + Nd, dim), from `decode` -> (B, Nt, dim) for `plan.thrown`, before the last norm.

        The mean of the visible and decoded tokens around a thrown one, or the mask token where there are none, and
        the thrown token's own position.
        """
        assert self.recovery is not None
        places = torch.cat([plan.keep_tokens, plan.decode], dim=1)
        means, has_neighbour = self.recovery(
            decoded[:, self.num_prefix_tokens :], places, plan.thrown, plan.token_grid
        )
        content = means.where(has_neighbour.unsqueeze(-1), self.mask_token).to(decoded.dtype)
        return content + self.positions(plan.token_grid)[plan.once(plan.thrown)]

    def forward(self, x: Tensor, plan: MaskPlan) -> Tensor:
        """x: (B, P + Nv, in_dim) -> predictions (B, Nd + Nt, out_dim) for `plan.masked`, in its order; without recovery
        (B, Nd, out_dim) for `plan.decode`."""
        decoded = self.decode(x, plan)
        masked = decoded[:, x.shape[1] :]
        if self.recovery is not None and plan.thrown.shape[1]:
            masked = torch.cat([masked, self.recover(decoded, plan)], dim=1)
        predictions: Tensor = self.head(self.out_norm(masked))
        return predictions


def decoder_heads(dim: int, depth: int, num_heads: int | None) -> int:
    """The number of attention heads of a decoder, its size checked; see `LocalDecoder`."""
    if depth < 1:
        raise ValueError(
            f"decoder.depth is {depth}; it must be at least 1, or masked tokens would see nothing"
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
