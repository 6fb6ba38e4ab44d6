"""Bytes of activations that a training step holds for its backward passes, counted from the tensors that autograd saves.

The count does not depend on an allocator, so it is equal on a CPU and on a GPU. Serves `pipelines/benchmark.py memory`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bim.orchestrator.training.block_trainer import TRANSPORT_DTYPES
from bim.orchestrator.training.build import build_local_mim, mask_plans, open_spec_backbone
from bim.orchestrator.training.spec import Precision, PretrainSpec

# Batch size of the first count; the second has twice as many. Not 1: a batch of one makes some tensors contiguous.
COUNTED = 2


@dataclass
class SavedBytes:
    """Bytes of distinct storages that autograd has saved, without parameters."""

    total: int = 0
    _seen: set[int] = field(default_factory=set)

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.total += storage.nbytes()


@contextmanager
def counting_saved(parameters: Iterator[Tensor]) -> Iterator[SavedBytes]:
    """Count what autograd saves inside the context, which must not free tensors (no backward pass)."""
    saved = SavedBytes(_seen={p.untyped_storage().data_ptr() for p in parameters})

    def pack(tensor: Tensor) -> Tensor:
        saved.add(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def saved_activations(
    spec: PretrainSpec, batch: int, seed: int = 0, precision: Precision = "fp32"
) -> list[int]:
    """Bytes saved for the backward pass of each block's local loss, in one training step of `batch` random images.

    Each block's graph is freed before the next block, so the peak of a process is the largest number among its blocks.
    K = 1 gives one number: the end-to-end model. A block's detached input is counted where autograd saves it.

    Tensors that do not grow with the batch are left out: cast copies of the weights under bf16 and fp16, and attention
    masks that all samples share.
    """
    return growing(lambda images: saved_in_step(spec, images, seed, precision), batch)


def growing(count: Callable[[int], Sequence[int]], batch: int) -> list[int]:
    """The part of the byte counts `count(images)` that is proportional to the number of images, for `batch` images."""
    once, twice = count(COUNTED), count(2 * COUNTED)
    return [(larger - smaller) * batch // COUNTED for smaller, larger in zip(once, twice, strict=True)]


def saved_in_step(spec: PretrainSpec, batch: int, seed: int = 0, precision: Precision = "fp32") -> list[int]:
    """All bytes saved per block with `batch` images under autocast on the CPU; see `saved_activations`."""
    backbone = open_spec_backbone(spec)
    x = images = torch.rand(batch, 3, *backbone.image_size, generator=torch.Generator().manual_seed(seed))
    plans = mask_plans(spec, backbone, backbone.image_size, batch, step=0, micro_step=0)
    totals = []
    for k in range(len(spec.blocks)):
        module = build_local_mim(spec, k, backbone).train()
        with counting_saved(iter(module.parameters())) as saved, autocast("cpu", precision):
            out = module(x, images, plans[k])
        totals.append(saved.total)
        out.loss.backward()
        x = out.activations
    return totals


def autocast(device_type: str, precision: Precision) -> torch.autocast:
    """The context of a forward pass in `precision`, as in `BlockTrainer`."""
    return torch.autocast(device_type, TRANSPORT_DTYPES[precision], enabled=precision != "fp32")
