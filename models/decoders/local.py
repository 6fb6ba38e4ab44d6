"""MAE's decoder for a block that encodes visible tokens, partial where the plan throws tokens (PR-MIM, arXiv 2411.15746)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bim.models.decoders.decoder import Decoder
from bim.models.decoders.recovery import NeighborAggregation
from bim.models.initialization import TOKEN_STD
from bim.models.masks.plan import MaskPlan
from bim.models.tokens import sincos_positions

# Thrown tokens are recovered from decoded neighbors, or neither predicted nor supervised.
RECOVERIES = ("none", "aggregate")


class LocalDecoder(Decoder):
    """A decoder with its own mask token and fixed sin-cos positions; see `Decoder` for its other parameters.

    recovery: "aggregate" predicts thrown tokens from decoded neighbors with 9 parameters per channel, "none" leaves them
    out. It does not change the random draws of the other parameters.

    Only visible and decoded tokens pass the layers, so that throwing tokens saves time and memory. The grid of tokens is
    the plan's. Raises ValueError, as `Decoder`, and if recovery is unknown.
    """

    encode = "visible"

    def __init__(self, *args: Any, recovery: str = "none", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if recovery not in RECOVERIES:
            raise ValueError(f"decoder.recovery is '{recovery}'; it must be one of {', '.join(RECOVERIES)}")
        dim = self.embed.out_features
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim).normal_(std=TOKEN_STD))
        self.recovery = NeighborAggregation(dim) if recovery == "aggregate" else None
        # Computed from the grid, hence not saved; a run has a handful of grids.
        self._positions: dict[tuple[tuple[int, int], torch.device, torch.dtype], Tensor] = {}

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """(N + 1, dim) for a grid of N tokens, on the device of the parameters; row N, all zero, is for prefix tokens."""
        like = self.mask_token
        key = (grid, like.device, like.dtype)
        if key not in self._positions:
            dim = like.shape[-1]
            self._positions[key] = torch.cat([sincos_positions(dim, grid), torch.zeros(1, dim)]).to(like)
        return self._positions[key]

    def decode(self, x: Tensor, plan: MaskPlan) -> Tensor:
        """x: (B, P + Nv, in_dim) unnormalized tokens of the block, in the order of `plan.keep_tokens` ->
        (B, P + Nv + Nd, dim), the layers' output before the last norm.

        Tokens stay in the plan's order, decoded ones last; attention does not depend on the order.
        """
        positions = self.positions(plan.token_grid)
        token_index = plan.unbatched_if_shared(torch.cat([plan.keep_tokens, plan.decode], dim=1))
        prefix = token_index.new_full((len(token_index), self.num_prefix_tokens), len(positions) - 1)
        visible = self.embed(self.norm(x))
        masks = self.mask_token.expand(x.shape[0], plan.decode.shape[1], -1)
        embedded = torch.cat([visible, masks], dim=1) + positions[torch.cat([prefix, token_index], dim=1)]
        decoded: Tensor = self.layers(embedded)
        return decoded

    def recover(self, decoded: Tensor, plan: MaskPlan) -> Tensor:
        """decoded: (B, P + Nv + Nd, dim), from `decode` -> (B, Nt, dim) for `plan.thrown`, before the last norm.

        The mean of the visible and decoded neighbors of a thrown token, or the mask token where it has none, plus the
        position of the thrown token.
        """
        assert self.recovery is not None
        token_index = torch.cat([plan.keep_tokens, plan.decode], dim=1)
        means, has_neighbor = self.recovery(
            decoded[:, self.num_prefix_tokens :], token_index, plan.thrown, plan.token_grid
        )
        content = means.where(has_neighbor.unsqueeze(-1), self.mask_token).to(decoded.dtype)
        return content + self.positions(plan.token_grid)[plan.unbatched_if_shared(plan.thrown)]

    def forward(self, x: Tensor, plan: MaskPlan) -> Tensor:
        """x: (B, P + Nv, in_dim) -> (B, Nd + Nt, out_dim), predictions of `plan.masked`; without recovery (B, Nd, out_dim),
        those of `plan.decode`."""
        decoded = self.decode(x, plan)
        masked = decoded[:, x.shape[1] :]
        if self.recovery is not None and plan.thrown.shape[1]:
            masked = torch.cat([masked, self.recover(decoded, plan)], dim=1)
        predictions: Tensor = self.head(self.out_norm(masked))
        return predictions
