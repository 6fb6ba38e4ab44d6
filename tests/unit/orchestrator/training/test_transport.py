from __future__ import annotations

import numpy as np
import pytest
import torch

from bim.orchestrator.training.transport import Payload, ReceiveBuffer, to_message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
def test_a_tensor_comes_out_as_it_went_in(dtype: torch.dtype) -> None:
    tensor = (torch.randn(2, 5, 3) * 50).to(dtype)
    out = ReceiveBuffer(torch.device("cpu")).unpack("x", to_message(tensor))
    assert out.dtype == dtype
    assert torch.equal(out, tensor)


def test_the_buffer_is_reused_and_never_the_senders_memory() -> None:
    buffer, first = ReceiveBuffer(torch.device("cpu")), torch.ones(4)
    a = buffer.unpack("x", to_message(first))
    a.add_(1)
    assert torch.equal(first, torch.ones(4))
    b = buffer.unpack("x", to_message(torch.zeros(4)))
    assert a.data_ptr() == b.data_ptr()


def test_read_only_arrays_are_taken_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    array = np.arange(6, dtype=np.float32)
    array.flags.writeable = False
    out = ReceiveBuffer(torch.device("cpu")).unpack("x", Payload("float32", array))
    out.mul_(2)
    assert not recwarn.list
