"""Errors of accelerators: which of them break a process for good, and what to say when the memory of a device is full."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from bim.orchestrator.training.errors import DeviceMemoryError

BROKEN_CONTEXT = re.compile(
    r"CUDA error|HIP error|device-side assert|illegal memory access|uncorrectable ECC|ECC error|\bXid\b|NCCL|"
    r"CUDNN_STATUS|CUBLAS_STATUS|unspecified launch failure|misaligned address|device is lost|cudaError"
)
"""Texts of errors after which every later call of the same process on the device fails."""

MEMORY_MARGIN = 0.9
"""Part of the free memory that an estimated batch uses: fragments and later layers need the rest."""


def breaks_device_context(error: BaseException) -> bool:
    """Whether a process that met this error, or one that caused it, must be replaced: its device answers no more.

    A full memory counts too: what a failed step holds is freed for certain only with its process.
    """
    return any(_breaks_device_context(link) for link in _chain(error))


def _breaks_device_context(error: BaseException) -> bool:
    if isinstance(error, DeviceMemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, getattr(torch, "AcceleratorError", ())):
        return True
    # Compared by name, since an error may come from a process with another torch.
    names = {base.__name__ for base in type(error).__mro__}
    if names & {"AcceleratorError", "DistBackendError", "OutOfMemoryError"}:
        return True
    return isinstance(error, RuntimeError) and BROKEN_CONTEXT.search(str(error)) is not None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def fitting_batch_size(batch_size: int, fixed: int, needed: int, available: int) -> int:
    """Largest batch that fits, if what a step allocates is linear in the batch; 0 if none does.

    Args:
        batch_size: of the step that failed.
        fixed: bytes that the stage held before the step: weights, gradients, optimizer.
        needed: bytes that the step needed at least, with those: held at its peak, and the request that failed.
        available: bytes that the stage can have: what it holds and what is free.
    """
    per_image = max(1.0, (needed - fixed) / batch_size)
    images = int(max(0.0, available * MEMORY_MARGIN - fixed) / per_image)
    images = min(images, batch_size - 1)
    return images - images % 8 if images >= 8 else images


def requested_bytes(message: str) -> int:
    """The size in `Tried to allocate 2.00 GiB` of torch's message; 0 if there is none."""
    match = re.search(r"[Tt]ried to allocate ([\d.]+) (bytes|[KMG]iB)", message)
    units = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
    return int(float(match[1]) * units[match[2]]) if match else 0


def device_memory_error(
    blocks: str, error: BaseException, batch_size: int, fixed: int, peak: int, available: int, total: int
) -> DeviceMemoryError:
    """The message for a step that found the memory of its device full.

    Args:
        blocks: what the stage trains, "block 2".
        fixed, peak: bytes that this process held before the step, and at most in it.
        available: bytes that this process reserved and those that are free.
        total: bytes of the device.
    """
    needed = max(peak + requested_bytes(str(error)), available + 1)
    batch = fitting_batch_size(batch_size, fixed, needed, available)
    others = max(0, total - available)
    advice = (
        f"a data.batch_size of about {batch} would fit"
        if batch
        else "not even one image fits: choose a smaller model, or more GPUs"
    )
    shared = f", other processes {_gib(others)}" if others > total // 20 else ""
    return DeviceMemoryError(
        f"the device memory of {blocks} is full: {_gib(fixed)} for weights and optimizer and at least "
        f"{_gib(needed - fixed)} for a batch of {batch_size}, of {_gib(total)}{shared}; {advice}, or the same batch in "
        "several data.accumulate parts"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
