"""Decoders: the tokens of one block -> predictions for its masked tokens. To add one: a class and a line in `DECODERS`.

A decoder is private to its block and is dropped after pretraining, except its first norm, which becomes the final norm of
the exported depth variant.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from bim.models.decoders.decoder import Decoder
from bim.models.decoders.light import LightDecoder
from bim.models.decoders.local import LocalDecoder

DECODERS: dict[str, Callable[..., nn.Module]] = {"local": LocalDecoder, "light": LightDecoder}
"""What makes a decoder takes the keywords of `Decoder`, and `recovery` where thrown tokens are to be recovered. The decoder
takes (tokens, plan) and has modules `norm`, a LayerNorm of width in_dim, and `head`, a linear layer to out_dim. An attribute
`encode`, "visible" or "all", says which encoders it is for; without one it is for both."""

DECODER_BY_ENCODING = {"visible": "local", "all": "light"}

BUILT_IN_DECODERS = frozenset((*DECODERS, "auto"))


def decoder_class(name: str, encode: str) -> Callable[..., nn.Module]:
    """What makes the decoder `name`, "auto" for that of the encoding; encode: "visible" or "all". Raises KeyError."""
    return DECODERS[DECODER_BY_ENCODING[encode] if name == "auto" else name]


__all__ = [
    "BUILT_IN_DECODERS",
    "DECODERS",
    "DECODER_BY_ENCODING",
    "Decoder",
    "LightDecoder",
    "LocalDecoder",
    "decoder_class",
]
