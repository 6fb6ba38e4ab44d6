"""FastMIM's decoder, for a block that encodes all tokens: a few layers over what the encoder says of every place.

The masked places carry tokens already, so there are no mask tokens, and the encoder gave them their positions
(papers.md 3.2). Like `LocalDecoder` it is private to its block; its first norm becomes the exported variant's.
"""

from __future__ import annotations

from functools import partial

from timm.models.vision_transformer import Block
from torch import Tensor, nn

from bim.models.decoders.local import decoder_heads
from bim.models.initialization import mae_init_
from bim.models.masks.plan import MaskPlan
from bim.models.tokens import gather_tokens


class LightDecoder(nn.Module):
    """norm, linear to `dim`, `depth` transformer layers, norm, linear to `out_dim`; over all tokens, read off the masked.

    in_dim: width D of the encoder's tokens. num_heads None: one per 32 of width, as in FastMIM. num_prefix_tokens: class
    and register tokens in front. norm_eps: of every LayerNorm.

    Parameters are drawn from torch's global CPU generator: build it inside `seeding.forked_rng`. Raises ValueError if the
    sizes do not fit each other; see `decoder_heads`.
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
    ) -> None:
        super().__init__()
        heads = decoder_heads(dim, depth, num_heads)
        layer_norm = partial(nn.LayerNorm, eps=norm_eps)
        self.num_prefix_tokens = num_prefix_tokens
        self.norm = layer_norm(in_dim)
        self.embed = nn.Linear(in_dim, dim)
        self.layers = nn.Sequential(
            *(Block(dim, heads, mlp_ratio, qkv_bias=True, norm_layer=layer_norm) for _ in range(depth))
        )
        self.out_norm = layer_norm(dim)
        self.head = nn.Linear(dim, out_dim)
        mae_init_(self)

    def forward(self, x: Tensor, plan: MaskPlan) -> Tensor:
        """x: (B, P + N, in_dim), all tokens row by row, un-normalised -> (B, Nm, out_dim), predictions of `plan.masked`.

        Raises ValueError if x does not hold the plan's token grid: the encoder must be one that keeps all tokens.
        """
        rows, columns = plan.token_grid
        if x.shape[1] != self.num_prefix_tokens + rows * columns:
            raise ValueError(
                f"{x.shape[1]} tokens with {self.num_prefix_tokens} prefix tokens are not the {rows} x {columns} tokens of "
                "the plan; this decoder needs an encoder of all tokens"
            )
        decoded = self.layers(self.embed(self.norm(x)))[:, self.num_prefix_tokens :]
        # Norm and head work token by token: only those that are scored need them.
        predictions: Tensor = self.head(self.out_norm(gather_tokens(decoded, plan.masked)))
        return predictions
