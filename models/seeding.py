"""Random numbers as a function of names and numbers: a run resumes at any step, and no stage depends on another.

Random numbers are drawn on the CPU from `generator(seed, ...)`, or inside `forked_rng(seed, ...)` where a library uses
torch's global generator. Only the boundary noise is drawn on the device of the tokens and depends on its type. No
function changes the global seed beyond its own call.
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
    """A context in which torch's global CPU generator is seeded by `parts`; its state is restored on exit.

    For constructors that draw parameters from the global generator (`nn.Linear`, timm). Generators of accelerators are
    unchanged: modules are built on the CPU.
    """
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed also seeds every accelerator, which fork_rng(devices=[]) does not restore.
        torch.random.default_generator.manual_seed(derive_seed(*parts))
        yield
