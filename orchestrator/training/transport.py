"""Transport of tensors between stages as numpy views, whose bytes Ray transfers without pickling.

Pickling a torch tensor costs several times more than a numpy view. numpy has no bfloat16; such tensors travel as int16.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Payload:
    """A tensor in transport: the name of its torch dtype, and its bytes as a numpy array of the same shape."""

    dtype: str
    array: np.ndarray


def to_message(tensor: Tensor) -> Payload:
    """View (on a GPU: copy to host memory) a tensor of any shape as a payload."""
    host = tensor.detach().contiguous().cpu()
    name = str(host.dtype).removeprefix("torch.")
    return Payload(name, (host.view(torch.int16) if host.dtype == torch.bfloat16 else host).numpy())


class ReceiveBuffer:
    """Receives payloads into one reused buffer per name.

    On Ray an array is read-only shared memory, so it is copied. Reusing the buffer avoids page faults, which cost more
    than the transport. A received tensor is valid until the next `unpack` under the same name.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[str, Tensor] = {}

    def unpack(self, name: str, payload: Payload) -> Tensor:
        """Copy a payload to this buffer's device. Returns a tensor of the payload's shape and dtype."""
        dtype: torch.dtype = getattr(torch, payload.dtype)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != payload.array.shape or buffer.dtype != dtype:
            pinned = self._device.type == "cuda"
            buffer = torch.empty(payload.array.shape, dtype=dtype, pin_memory=pinned)
            self._buffers[name] = buffer
        view = buffer.view(torch.int16) if dtype == torch.bfloat16 else buffer
        np.copyto(view.numpy(), payload.array)
        return buffer if self._device.type == "cpu" else buffer.to(self._device)
