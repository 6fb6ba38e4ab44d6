"""Bytes that training a block takes, computed before anything is allocated: weights, gradients, optimizer, activations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bim.models.backbones.backbone import Backbone
from bim.models.initialization import NoInitialization
from bim.orchestrator.training.block_trainer import TRANSPORT_DTYPES
from bim.orchestrator.training.build import build_local_mim, mask_plans
from bim.orchestrator.training.spec import Precision, PretrainSpec

ADAMW_MOMENTS = 2
"""Tensors of the size of a trained parameter that AdamW keeps."""


@dataclass(frozen=True)
class BlockMemory:
    """Bytes of one block with its local decoder in training.

    Args:
        parameters: of the encoder block and its decoder, in float32.
        activations: what autograd saves for the backward pass of a micro-batch.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it; without what libraries and the allocator need."""
        return self.parameters + self.gradients + self.optimizer + self.activations


def block_memories(
    spec: PretrainSpec, backbone: Backbone, size: tuple[int, int], batch: int, precision: Precision
) -> list[BlockMemory]:
    """The memory of every block for micro-batches of `batch` images of `size` (height, width).

    The forward pass runs on fake tensors, which have shapes and storages but no memory: nothing is computed.
    """
    plans = mask_plans(spec, backbone, size, batch, step=0, micro_step=0)
    memories = []
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        x = images = torch.empty(batch, 3, *size)
    for k in range(len(spec.blocks)):
        with NoInitialization():
            module = build_local_mim(spec, k, backbone).train()
        trained = sum(_bytes(p) for p in module.parameters() if p.requires_grad)
        weights = [mode.from_tensor(tensor) for tensor in (*module.parameters(), *module.buffers())]
        saved = _Saved(weights)
        with (
            mode,
            torch.autograd.graph.saved_tensors_hooks(saved.add, lambda tensor: tensor),
            torch.autocast("cpu", TRANSPORT_DTYPES[precision], enabled=precision != "fp32"),
        ):
            out = module(x, images, plans[k])
            x = out.activations.detach()
        memories.append(
            BlockMemory(sum(map(_bytes, module.parameters())), trained, ADAMW_MOMENTS * trained, saved.total)
        )
    return memories


def _bytes(tensor: Tensor | nn.Parameter) -> int:
    return tensor.numel() * tensor.element_size()


class _Saved:
    """Sum of the bytes of distinct storages, other than those of `weights`."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self.total = 0
        self._tensors = list(weights)  # held, so that no storage is freed and its address used again
        self._seen = {_storage(tensor) for tensor in self._tensors}

    def add(self, tensor: Tensor) -> Tensor:
        self._tensors.append(tensor)
        if _storage(tensor) not in self._seen:
            self._seen.add(_storage(tensor))
            self.total += tensor.untyped_storage().nbytes()
        return tensor


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
