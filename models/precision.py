"""Computations that mixed precision must not change."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast_disabled(device: torch.device) -> AbstractContextManager[object]:
    """A context without autocast for `device`: operations run in the precision of their operands.

    The meta device, on which costs are counted, has no autocast and raises if it is disabled.
    """
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
