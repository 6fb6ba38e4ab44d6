"""Randomness as a function of names and numbers, so that resuming a run is arithmetic and no stage depends on
another.

Everything random in the project is drawn on the CPU from `generator(seed, ...)`, or inside `forked_rng(seed, ...)` where a
library draws from torch's own generator. The noise on a boundary alone, too much to carry over in every step, is drawn where
the tokens are, and depends on the kind of device. No function here, or anywhere, sets a seed that outlives it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from `parts`; the same in every process and every version of Python.

    `1` and `"1"` differ, and so do `("ab", "c")` and `("a", "bc")`: type and length go into the hash.
    """
    digest = blake2b(digest_size=8)
    for part in parts:
        text = str(part).encode()
        digest.update(f"{'s' if isinstance(part, str) else 'i'}{len(text)}:".encode() + text)
    return int.from_bytes(digest.digest(), "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by `derive_seed(*parts)`."""
    return torch.Generator().manual_seed(derive_seed(*parts))


@contextmanager
def forked_rng(*parts: int | str) -> Iterator[None]:
    """Inside, torch's global CPU generator is seeded by `parts`; on leaving, it is as it was before.

    For constructors that draw their parameters from the global generator (`nn.Linear`, timm). Accelerators'
    generators are left alone: modules are built on the CPU.
    """
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed every accelerator too, and fork_rng(devices=[]) would not give that back.
        torch.random.default_generator.manual_seed(derive_seed(*parts))
        yield
