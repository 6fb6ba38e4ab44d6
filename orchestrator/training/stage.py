"""A run of consecutive blocks on one device, trained block by block. Wrapped with `ray.remote` by `distributed/`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bim.models.backbones.backbone import Backbone
from bim.models.masks.plan import MaskPlan
from bim.models.seeding import derive_seed
from bim.models.tokens import normalize_images
from bim.orchestrator.training.block_trainer import BlockTrainer
from bim.orchestrator.training.build import build_local_mim, mask_plans, open_spec_backbone
from bim.orchestrator.training.checkpoint import FileRecord, load_block_state, load_block_weights, save_block
from bim.orchestrator.training.errors import StepOrderError
from bim.orchestrator.training.messages import StageReport, StepRequest
from bim.orchestrator.training.spec import PretrainSpec
from bim.orchestrator.training.transport import Payload, ReceiveBuffer, to_message


class Stage:
    """A run of consecutive blocks on one device, trained block by block.

    Args:
        blocks: the numbers of the blocks that live here, consecutive.
        device: "cpu" or "cuda".
        threads: CPU threads of this process for torch; None leaves it alone.
    """

    def __init__(
        self, spec: PretrainSpec, blocks: Sequence[int], device: str = "cpu", threads: int | None = None
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._spec = spec
        self._blocks = tuple(blocks)
        self._device = torch.device(device)
        self._inbox = ReceiveBuffer(self._device)
        self._backbone = open_spec_backbone(spec)
        self._trainers: list[BlockTrainer] = []
        self._target_sharing = _target_sharing(spec, self._backbone, self._blocks)
        self._next = (0, 0)
        self._planner = ThreadPoolExecutor(1, thread_name_prefix="plans")
        self._ahead: tuple[Any, Future[dict[int, MaskPlan]]] | None = None
        self._idle_since: float | None = None

    def restore(self, checkpoint: str | None, step: int) -> int:
        """Build the blocks anew and, if given, load them from a checkpoint folder. The next step is `step`."""
        self._trainers = []  # freed before the new ones are built: a GPU may not hold both
        self._trainers = [
            BlockTrainer(build_local_mim(self._spec, k, self._backbone), k, self._spec.optim, self._device)
            for k in self._blocks
        ]
        if checkpoint is not None:
            for k, trainer in zip(self._blocks, self._trainers, strict=True):
                trainer.load(load_block_weights(Path(checkpoint), k), load_block_state(Path(checkpoint), k))
        self._next = (step, 0)
        self._idle_since = None  # until the first step the others may still be starting
        return step

    def train_step(
        self, order: StepRequest, images: Payload, incoming: Payload | None
    ) -> tuple[Payload | None, StageReport]:
        """Train this stage's blocks on one micro-batch.

        Args:
            images: (B, 3, H, W) uint8, shared by all stages.
            incoming: (B, P + visible, D) residual stream of the stage before; None for the first.

        Returns:
            The residual stream for the next stage (None from the last one), and the report.

        Raises:
            StepOrderError: if this is not the stage's own next micro-batch; nothing was changed.
        """
        if (order.step, order.micro) != self._next:
            raise StepOrderError(
                f"blocks {self._blocks} stand at (step, micro) {self._next}, got {(order.step, order.micro)}"
            )
        started = time.perf_counter()
        idle = 0.0 if self._idle_since is None else started - self._idle_since
        pixels = normalize_images(self._inbox.unpack("images", images), self._spec.mean, self._spec.std)
        x = pixels if incoming is None else self._inbox.unpack("tokens", incoming).float()
        asked = time.perf_counter()
        plans = self._plans(pixels.shape, order)
        mask_wait = time.perf_counter() - asked
        metrics: dict[int, dict[str, float]] = {}
        shared: dict[int, Tensor] = {}
        for k, trainer in zip(self._blocks, self._trainers, strict=True):
            alike = self._target_sharing[k]
            if alike not in shared:
                shared = {alike: trainer.module.targets(pixels)}
            y, metrics[k] = trainer.train_step(
                self._add_boundary_noise(x, k, order) if k else x,
                pixels,
                plans[k],
                targets=shared[alike],
                step=order.step,
                lr=order.lr,
                micro=order.micro,
                grad_accum_steps=order.grad_accum_steps,
            )
            x = y.float()
        self._next = (order.step + 1, 0) if order.is_last_micro_step else (order.step, order.micro + 1)
        files = self.save(order.checkpoint) if order.checkpoint is not None else ()
        last = self._blocks[-1] == len(self._spec.blocks) - 1
        outgoing = None if last else to_message(y)
        ended = time.perf_counter()
        self._idle_since = ended
        return outgoing, StageReport(
            metrics, tuple(files), ended - started - mask_wait, idle + mask_wait, mask_wait
        )

    def _plans(self, shape: torch.Size, order: StepRequest) -> dict[int, MaskPlan]:
        """The plans of this micro-batch, made while the one before was trained on, and those of the next one begun.

        Grouping windows and sampling tokens is work for the host; on a GPU it would stand between two steps.
        """
        size, batch = (shape[-2], shape[-1]), shape[0]

        def begin(step: int, micro: int) -> tuple[Any, Future[dict[int, MaskPlan]]]:
            wanted = (size, batch, step, micro)
            what = (self._spec, self._backbone, *wanted, self._blocks, self._device)
            return wanted, self._planner.submit(mask_plans, *what)

        if self._ahead is None or self._ahead[0] != (size, batch, order.step, order.micro):
            self._ahead = begin(order.step, order.micro)
        plans = self._ahead[1].result()
        # Where images change their size, what was begun for the next step is not used.
        self._ahead = (
            begin(order.step + 1, 0) if order.is_last_micro_step else begin(order.step, order.micro + 1)
        )
        return plans

    def _add_boundary_noise(self, x: Tensor, block: int, order: StepRequest) -> Tensor:
        """x: (B, T, D) -> the same with Gaussian noise of `boundary_noise` standard deviations of x added.

        Siddiqui et al., arXiv 2302.01647, scale it by the activations' deviation too, and let the block's own head see it;
        here only what crosses the boundary gets it.
        """
        if not self._spec.boundary_noise:
            return x
        gen = torch.Generator(self._device).manual_seed(
            derive_seed(self._spec.seed, "noise", order.step, order.micro, block)
        )
        noise = torch.randn(x.shape, generator=gen, device=x.device)
        return x + self._spec.boundary_noise * x.std() * noise

    def save(self, checkpoint: str) -> tuple[FileRecord, ...]:
        """Write every block of this stage into a checkpoint folder, uncommitted."""
        records = []
        for k, trainer in zip(self._blocks, self._trainers, strict=True):
            records += save_block(Path(checkpoint), k, trainer.weights(), trainer.state_dict())
        return tuple(records)

    def weights(self) -> dict[int, dict[str, Tensor]]:
        """Weights of every block here, on the CPU."""
        return {k: t.weights() for k, t in zip(self._blocks, self._trainers, strict=True)}


def _target_sharing(spec: PretrainSpec, backbone: Backbone, blocks: Sequence[int]) -> dict[int, int]:
    """Block -> the first of `blocks` that predicts the same of the same tokens."""
    what = {k: (spec.targets[k] if spec.targets else None, backbone.blocks[k].stride) for k in blocks}
    return {k: next(first for first in blocks if what[first] == what[k]) for k in blocks}
