"""The form in which tensors travel between stages: numpy views, which Ray ships without pickling their bytes.

A pickled torch tensor costs several times what a numpy view of it costs, and numpy has no bfloat16, so that one travels
as int16. Both directions live here, so that a GPU-to-GPU path can join behind the same two functions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Payload:
    """A tensor on the wire: its dtype by name and its bytes as a numpy array of the same shape."""

    dtype: str
    array: np.ndarray


def to_message(tensor: Tensor) -> Payload:
    """View (on a GPU: copy to host memory) a tensor of any shape as a payload."""
    host = tensor.detach().contiguous().cpu()
    name = str(host.dtype).removeprefix("torch.")
    return Payload(name, (host.view(torch.int16) if host.dtype == torch.bfloat16 else host).numpy())


class ReceiveBuffer:
    """Receives payloads into one reused buffer per name.

    What arrives is read-only shared memory on Ray; copying it into memory of our own makes it a proper tensor input, and
    reusing that memory saves the page faults that cost more than the transport. A received tensor is
    valid until the next `unpack` under the same name.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[str, Tensor] = {}

    def unpack(self, name: str, payload: Payload) -> Tensor:
        """Copy a payload to this inbox's device. Returns a tensor of the payload's shape and dtype."""
        dtype: torch.dtype = getattr(torch, payload.dtype)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != payload.array.shape or buffer.dtype != dtype:
            pinned = self._device.type == "cuda"
            buffer = torch.empty(payload.array.shape, dtype=dtype, pin_memory=pinned)
            self._buffers[name] = buffer
        raw = buffer.view(torch.int16) if dtype == torch.bfloat16 else buffer
        np.copyto(raw.numpy(), payload.array)
        return buffer if self._device.type == "cpu" else buffer.to(self._device)
