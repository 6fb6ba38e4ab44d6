from __future__ import annotations

import pytest
import torch

from bim.orchestrator.training.device_errors import (
    breaks_device_context,
    device_memory_error,
    fitting_batch_size,
    requested_bytes,
)
from bim.orchestrator.training.errors import DeviceMemoryError, NonFiniteLossError

GIB = 1 << 30


class AcceleratorError(RuntimeError):
    """Of a torch that this one does not know."""


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be reported later"),
        RuntimeError("CUDA error: uncorrectable ECC error encountered"),
        RuntimeError("NCCL communicator was aborted on rank 1."),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        RuntimeError("HIP error: unspecified launch failure"),
        AcceleratorError("the device is gone"),
        torch.OutOfMemoryError("CUDA out of memory."),
        DeviceMemoryError("the device memory of block 1 is full"),
    ],
    ids=lambda error: str(error)[:30],
)
def test_errors_after_which_a_process_cannot_use_its_device(error: BaseException) -> None:
    assert breaks_device_context(error)
    wrapped = ValueError("in a step")
    wrapped.__cause__ = error
    assert breaks_device_context(wrapped)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"),
        NonFiniteLossError("loss", 1, 2, 0.1),
        ValueError("CUDA error is a word of this sentence"),
        OSError(28, "No space left on device"),
    ],
)
def test_errors_that_leave_the_device_usable(error: BaseException) -> None:
    assert not breaks_device_context(error)


def test_the_batch_that_fits_is_linear_in_what_a_step_allocates() -> None:
    # 4 GiB of weights; 512 images needed 20 GiB more at least, where 16 GiB are there.
    assert fitting_batch_size(512, fixed=4 * GIB, needed=24 * GIB, available=20 * GIB) == 352
    assert fitting_batch_size(4, fixed=0, needed=8 * GIB, available=6 * GIB) == 2
    assert fitting_batch_size(16, fixed=4 * GIB, needed=30 * GIB, available=3 * GIB) == 0
    assert fitting_batch_size(16, fixed=0, needed=GIB, available=80 * GIB) == 8, "less than what failed"


def test_the_size_of_the_failed_request_is_in_torchs_message() -> None:
    text = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 23.69 GiB of which"
    assert requested_bytes(text) == 2.5 * GIB
    assert requested_bytes("out of memory") == 0


def test_the_message_has_the_blocks_the_memory_and_the_batch() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    told = device_memory_error("block 2", error, 512, 4 * GIB, 18 * GIB, 19 * GIB, 24 * GIB)
    assert str(told) == (
        "the device memory of block 2 is full: 4.00 GiB for weights and optimizer and at least 16.00 GiB for a batch of "
        "512, of 24.00 GiB, other processes 5.00 GiB; a data.batch_size of about 416 would fit, or the same batch in "
        "several data.accumulate parts"
    )
