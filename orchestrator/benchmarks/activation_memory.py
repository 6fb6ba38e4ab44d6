"""Bytes of activations that a training step holds for its backward passes, counted from what autograd saves.

Exact and free of allocators, so that it says the same on a laptop and on a GPU. Serves `pipelines/benchmark.py memory`;
imports neither ray, mlflow nor pydantic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bim.orchestrator.training.block_trainer import WIRE_DTYPES
from bim.orchestrator.training.build import build_local_mim, mask_plans, open_spec_backbone
from bim.orchestrator.training.spec import Precision, PretrainSpec

# Images that are counted with, and twice as many. Not 1: tensors that one image makes contiguous are not copied.
COUNTED = 2


@dataclass
class SavedBytes:
    """Bytes of distinct storages that autograd has saved so far, parameters left out."""

    total: int = 0
    _seen: set[int] = field(default_factory=set)

    def note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.total += storage.nbytes()


@contextmanager
def counting_saved(parameters: Iterator[Tensor]) -> Iterator[SavedBytes]:
    """Counts what is saved inside the block. Nothing may be freed while counting (no backward inside)."""
    saved = SavedBytes(_seen={p.untyped_storage().data_ptr() for p in parameters})

    def pack(tensor: Tensor) -> Tensor:
        saved.note(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def saved_activations(
    spec: PretrainSpec, batch: int, seed: int = 0, precision: Precision = "fp32"
) -> list[int]:
    """Bytes saved for the backward pass of each block's local loss, in one training step of `batch` random images.

    Blocks are trained one after the other and each graph is freed before the next, so the peak of a family in one process
    is the largest of them, and every stage on a GPU of its own has its own blocks' largest. K = 1 gives one number: the
    end-to-end model. Each block's detached input (counted where it is saved) is what crosses the boundary.

    What does not grow with the batch is left out: under bf16 and fp16 the cast copies of the weights, and the masks of
    attention that all samples share.
    """
    return growing(lambda images: saved_in_step(spec, images, seed, precision), batch)


def growing(count: Callable[[int], Sequence[int]], batch: int) -> list[int]:
    """The part of `count(images)`, numbers of bytes, that is proportional to the number of images, for `batch` of them."""
    few, more = count(COUNTED), count(2 * COUNTED)
    return [(larger - smaller) * batch // COUNTED for smaller, larger in zip(few, more, strict=True)]


def saved_in_step(spec: PretrainSpec, batch: int, seed: int = 0, precision: Precision = "fp32") -> list[int]:
    """All bytes that `saved_activations` tells a part of, counted with `batch` images under autocast on the CPU."""
    backbone = open_spec_backbone(spec)
    x = images = torch.rand(batch, 3, *backbone.image_size, generator=torch.Generator().manual_seed(seed))
    plans = mask_plans(spec, backbone, backbone.image_size, batch, step=0, micro=0)
    found = []
    for k in range(len(spec.blocks)):
        module = build_local_mim(spec, k, backbone).train()
        with counting_saved(iter(module.parameters())) as saved, autocast("cpu", precision):
            out = module(x, images, plans[k])
        found.append(saved.total)
        out.loss.backward()
        x = out.activations
    return found


def autocast(device_type: str, precision: Precision) -> torch.autocast:
    """The context of a forward pass in `precision`, as in `BlockTrainer`."""
    return torch.autocast(device_type, WIRE_DTYPES[precision], enabled=precision != "fp32")
