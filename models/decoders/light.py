"""FastMIM's decoder (arXiv 2212.06593) for blocks that encode all tokens.

Masked positions have tokens already, with positions from the encoder: there are no mask tokens and no positions here.
"""

from __future__ import annotations

from torch import Tensor

from bim.models.decoders.decoder import Decoder
from bim.models.masks.plan import MaskPlan
from bim.models.tokens import gather_tokens


class LightDecoder(Decoder):
    """A decoder over all tokens that predicts the masked ones; see `Decoder` for its parameters."""

    encode = "all"

    def forward(self, x: Tensor, plan: MaskPlan) -> Tensor:
        """x: (B, P + N, in_dim), all tokens row by row, unnormalized -> (B, Nm, out_dim), predictions of `plan.masked`.

        Raises ValueError if x does not hold the plan's token grid.
        """
        rows, columns = plan.token_grid
        if x.shape[1] != self.num_prefix_tokens + rows * columns:
            raise ValueError(
                f"{x.shape[1]} tokens with {self.num_prefix_tokens} prefix tokens are not the {rows} x {columns} tokens of "
                "the plan; this decoder needs an encoder of all tokens"
            )
        decoded = self.layers(self.embed(self.norm(x)))[:, self.num_prefix_tokens :]
        # Norm and head work token by token: only masked tokens need them.
        predictions: Tensor = self.head(self.out_norm(gather_tokens(decoded, plan.masked)))
        return predictions
