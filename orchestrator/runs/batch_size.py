"""The largest micro-batch that the memory of the stages holds: computed, then tried."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import torch

from bim.orchestrator.data.source import Source
from bim.orchestrator.data.splits import Splits
from bim.orchestrator.distributed.placement import StageLayout
from bim.orchestrator.runs.estimate import run_memories
from bim.orchestrator.runs.prepare import ResolvedRun
from bim.orchestrator.runs.step_probe import Probe
from bim.orchestrator.runs.step_times import probe_error
from bim.orchestrator.training.errors import StageFailure
from bim.orchestrator.training.memory import BlockMemory
from bim.orchestrator.training.messages import StepRequest
from bim.orchestrator.training.spec import Precision
from bim.orchestrator.training.stage_group import InProcessStages

MEMORY_SHARE = 0.8
"""Share of a device's memory that weights, optimizer and activations may take; libraries and fragments need the rest."""


def largest_batch(
    memories: Sequence[BlockMemory], batch_size: int, layout: StageLayout, device_bytes: float, limit: int
) -> int:
    """The largest power of two, at most `limit`, that fits every stage; 0 if not even one image does.

    Args:
        memories: of every block at micro-batches of `batch_size` images; activations are linear in it.
        device_bytes: memory of a GPU, or of the machine whose CPUs all stages share.
    """
    fixed, per_image = [], []
    for blocks in layout.stage_blocks:
        of_stage = [memories[k] for k in blocks]
        fixed.append(sum(memory.total - memory.activations for memory in of_stage))
        # Each block is trained to the end of its backward pass before the next one begins.
        per_image.append(max(memory.activations for memory in of_stage) / batch_size)
    if layout.gpus:
        room = MEMORY_SHARE * device_bytes * min(1.0, layout.gpus)
        most = min(
            (room - fixed_bytes) / image_bytes
            for fixed_bytes, image_bytes in zip(fixed, per_image, strict=True)
        )
    else:
        most = (MEMORY_SHARE * device_bytes - sum(fixed)) / sum(per_image)
    most = min(most, limit)
    return 0 if most < 1 else 1 << (int(most).bit_length() - 1)


def with_batch_size(run: ResolvedRun, batch_size: int) -> ResolvedRun:
    """The run with micro-batches of that size in every phase, to compute its memory; its schedule is not that of the run."""
    return replace(run, phases=tuple(replace(phase, batch_size=batch_size) for phase in run.phases))


def computed_batch(
    run: ResolvedRun, layout: StageLayout, precision: Precision, device_bytes: float, limit: int
) -> int:
    """`largest_batch` for a run, by `training.memory`."""
    return largest_batch(run_memories(with_batch_size(run, 4), precision), 4, layout, device_bytes, limit)


def tried_batch(probe: Probe, batch_size: int, images: tuple[Source, Splits] | None = None) -> int:
    """The first of `batch_size` and its halves of which one micro-batch can be trained in this process; 0 if none can.

    images: those of the run, if they are open already.

    Raises:
        DataError, TrainingError: a step fails for another reason than memory.
    """
    images = images or probe.data.open()
    while batch_size and not _fits(probe, images, batch_size):
        batch_size //= 2
    return batch_size


def _fits(probe: Probe, images: tuple[Source, Splits], batch_size: int) -> bool:
    phase = replace(probe.data.phases[0], batch_size=batch_size)
    device = "cuda" if probe.layout.gpus and torch.cuda.is_available() else "cpu"
    threads = torch.get_num_threads()
    stages = InProcessStages(
        probe.spec,
        lambda: replace(probe.data, phases=(phase,)).batches_of(*images),
        probe.layout.stage_blocks,
        device,
        probe.layout.threads,
    )
    try:
        stages.restore(None, 0, lambda: False)
        stages.wait(stages.submit(StepRequest(0, lr=0.0)), 0.0)
        if device == "cuda":
            torch.cuda.synchronize()
    except StageFailure as failure:
        if not _is_memory_error(failure.cause):
            raise probe_error(failure) from failure
        return False
    except (torch.OutOfMemoryError, MemoryError):
        return False
    finally:
        stages.close()
        torch.set_num_threads(threads)
        if device == "cuda":
            torch.cuda.empty_cache()
    return True


def _is_memory_error(error: BaseException) -> bool:
    names = {base.__name__ for base in type(error).__mro__}
    return bool(
        names & {"DeviceMemoryError", "OutOfMemoryError", "MemoryError"}
    ) or "DefaultCPUAllocator" in str(error)


def gpu_bytes(gpus: Sequence[str]) -> float | None:
    """The smallest memory among GPUs as nvidia-smi lists them, `NVIDIA H100 80GB HBM3, 81559 MiB`; None if it is unknown."""
    sizes = [float(match[1]) for gpu in gpus if (match := re.search(r"(\d+) MiB", gpu))]
    return min(sizes) * 2**20 if sizes else None
