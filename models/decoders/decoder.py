"""The transformer decoder that `local.py` and `light.py` share: its modules, their sizes and their initialization."""

from __future__ import annotations

from functools import partial

from timm.models.vision_transformer import Block
from torch import nn

from bim.models.initialization import mae_init_

# Width per head if num_heads is None: MAE's decoder of width 512 has 16 heads.
HEAD_DIM = 32


class Decoder(nn.Module):
    """norm, linear to `dim`, `depth` transformer layers, norm, linear to `out_dim`.

    in_dim: width D of the encoder's tokens. num_heads: None gives one head per 32 of width. out_dim: values predicted per
    token. num_prefix_tokens: class and register tokens before the others. norm_eps: of every LayerNorm (timm's `Block`
    defaults to 1e-5).

    Parameters are drawn from torch's global CPU generator: build it inside `seeding.forked_rng`.
    Raises ValueError if the sizes do not fit each other, see `decoder_heads`.
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


def decoder_heads(dim: int, depth: int, num_heads: int | None) -> int:
    """Number of attention heads of a decoder.

    Raises ValueError if depth is below 1, or dim is no multiple of 4 (positions) or of the number of heads.
    """
    if depth < 1:
        raise ValueError(f"decoder.depth is {depth}; it must be at least 1 for masked tokens to see others")
    if dim < 4 or dim % 4:
        raise ValueError(f"decoder.dim is {dim}; it must be a multiple of 4 for its sin-cos positions")
    heads = max(1, dim // HEAD_DIM) if num_heads is None else num_heads
    if heads < 1 or dim % heads:
        origin = "the default" if num_heads is None else "decoder.num_heads"
        raise ValueError(
            f"decoder.dim {dim} is not divisible by {heads} heads ({origin}); set decoder.num_heads"
        )
    return heads
