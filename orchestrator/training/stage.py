"""A pipeline stage: consecutive blocks on one device. Wrapped with `ray.remote` by `distributed/stage_actor.py`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bim.models.backbones.backbone import Backbone
from bim.models.masks.plan import MaskPlan
from bim.models.seeding import derive_seed
from bim.models.tokens import normalize_images
from bim.orchestrator.training.block_trainer import BlockTrainer
from bim.orchestrator.training.build import build_local_mim, mask_plans, open_spec_backbone
from bim.orchestrator.training.checkpoint import load_block_state, load_block_weights
from bim.orchestrator.training.checkpoint_writer import BlockState, CheckpointWriter
from bim.orchestrator.training.device_errors import device_memory_error
from bim.orchestrator.training.errors import StepOrderError
from bim.orchestrator.training.messages import SavedBlocks, StageReport, StepRequest
from bim.orchestrator.training.spec import PretrainSpec
from bim.orchestrator.training.transport import Payload, ReceiveBuffer, to_message


class Stage:
    """Consecutive blocks on one device, each trained by its own loss.

    Args:
        blocks: numbers of the blocks, consecutive.
        device: "cpu" or "cuda".
        threads: torch CPU threads of this process; None keeps the current number.
    """

    def __init__(
        self, spec: PretrainSpec, blocks: Sequence[int], device: str = "cpu", threads: int | None = None
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._spec = spec
        self._blocks = tuple(blocks)
        self._device = torch.device(device)
        self._received = ReceiveBuffer(self._device)
        self._backbone = open_spec_backbone(spec)
        self._trainers: list[BlockTrainer] = []
        self._target_owner = _target_sharing(spec, self._backbone, self._blocks)
        self._next = (0, 0)
        self._writer = CheckpointWriter()
        self._plan_executor = ThreadPoolExecutor(1, thread_name_prefix="mask-plans")
        self._prefetched_plans: tuple[Any, Future[dict[int, MaskPlan]]] | None = None
        self._idle_since: float | None = None

    def restore(self, checkpoint: str | None, step: int) -> int:
        """Build the blocks and, if given, load them from a checkpoint folder. Returns the next step, `step`."""
        self._writer.discard()
        # A checkpoint has all weights: those that the run began with may be gone by now.
        spec = self._spec if checkpoint is None else replace(self._spec, init_from=None)
        self._trainers = []  # freed before the new ones are built, because a GPU may not hold both
        self._trainers = [
            BlockTrainer(build_local_mim(spec, k, self._backbone), k, self._spec.optim, self._device)
            for k in self._blocks
        ]
        if checkpoint is not None:
            for k, trainer in zip(self._blocks, self._trainers, strict=True):
                trainer.load(load_block_weights(checkpoint, k), load_block_state(checkpoint, k))
        self._next = (step, 0)
        self._idle_since = None  # before the first step, waiting for other stages to start is not idle time
        return step

    def train_step(
        self, request: StepRequest, images: Payload, incoming: Payload | None
    ) -> tuple[Payload | None, StageReport]:
        """Train this stage's blocks on one micro-batch.

        Args:
            images: (B, 3, H, W) uint8, equal in all stages.
            incoming: (B, P + visible, D) residual stream of the previous stage; None in the first stage.

        Returns:
            The residual stream for the next stage (None from the last stage), and the report.

        Raises:
            StepOrderError: this is not the stage's next micro-batch; nothing was changed.
            DeviceMemoryError: the memory of the device is full.
            OSError: an earlier checkpoint could not be written.
        """
        if (request.step, request.micro_step) != self._next:
            raise StepOrderError(
                f"blocks {self._blocks} expect (step, micro_step) {self._next}, got {(request.step, request.micro_step)}"
            )
        started = time.perf_counter()
        idle = 0.0 if self._idle_since is None else started - self._idle_since
        with self._explained_memory(len(images.array)):
            pixels = normalize_images(
                self._received.unpack("images", images), self._spec.mean, self._spec.std
            )
            x = pixels if incoming is None else self._received.unpack("tokens", incoming).float()
            plan_wait_started = time.perf_counter()
            plans = self._mask_plans(pixels.shape, request)
            mask_wait = time.perf_counter() - plan_wait_started
            y, metrics = self._train_blocks(x, pixels, plans, request)
        self._next = request.following
        if request.checkpoint is not None:
            self.save(request.checkpoint)
        is_last_stage = self._blocks[-1] == len(self._spec.blocks) - 1
        outgoing = None if is_last_stage else to_message(y)
        ended = time.perf_counter()
        self._idle_since = ended
        return outgoing, StageReport(
            metrics, self._writer.finished(), ended - started - mask_wait, idle + mask_wait, mask_wait
        )

    def _train_blocks(
        self, x: Tensor, pixels: Tensor, plans: dict[int, MaskPlan], request: StepRequest
    ) -> tuple[Tensor, dict[int, dict[str, float]]]:
        """One micro-batch through every block. Returns the residual stream of the last one, and block -> metrics."""
        metrics: dict[int, dict[str, float]] = {}
        targets: dict[int, Tensor] = {}
        for k, trainer in zip(self._blocks, self._trainers, strict=True):
            owner = self._target_owner[k]
            if owner not in targets:
                targets = {owner: trainer.module.targets(pixels)}
            y, metrics[k] = trainer.train_step(
                self._add_boundary_noise(x, k, request) if k else x,
                pixels,
                plans[k],
                targets=targets[owner],
                step=request.step,
                lr=request.lr,
                micro_step=request.micro_step,
                grad_accum_steps=request.grad_accum_steps,
            )
            x = y.float()
        return y, metrics

    @contextmanager
    def _explained_memory(self, batch_size: int) -> Iterator[None]:
        """Inside, a full device is reported with what the stage needs and the batch that would fit."""
        if self._device.type != "cuda":
            yield
            return
        fixed = torch.cuda.memory_allocated(self._device)
        try:
            yield
        except torch.OutOfMemoryError as error:
            peak = torch.cuda.max_memory_allocated(self._device)
            free, total = torch.cuda.mem_get_info(self._device)
            available = free + torch.cuda.memory_reserved(self._device)
            label = blocks_label(self._blocks)
            raise device_memory_error(label, error, batch_size, fixed, peak, available, total) from error

    def _mask_plans(self, shape: torch.Size, request: StepRequest) -> dict[int, MaskPlan]:
        """Plans of this micro-batch, prefetched during the previous one; starts those of the next one.

        Window grouping and token sampling run on the host; on a GPU they would stall the device between two steps.
        Plans that were prefetched for another image size are discarded.
        """
        size, batch_size = (shape[-2], shape[-1]), shape[0]

        def submit(step: int, micro_step: int) -> tuple[Any, Future[dict[int, MaskPlan]]]:
            key = (size, batch_size, step, micro_step)
            arguments = (self._spec, self._backbone, *key, self._blocks, self._device)
            return key, self._plan_executor.submit(mask_plans, *arguments)

        current = (size, batch_size, request.step, request.micro_step)
        if self._prefetched_plans is None or self._prefetched_plans[0] != current:
            self._prefetched_plans = submit(request.step, request.micro_step)
        plans = self._prefetched_plans[1].result()
        self._prefetched_plans = submit(*request.following)
        return plans

    def _add_boundary_noise(self, x: Tensor, block: int, request: StepRequest) -> Tensor:
        """Add Gaussian noise of `boundary_noise` standard deviations of x. x: (B, T, D) -> (B, T, D).

        Siddiqui et al. (arXiv 2302.01647) scale the noise by the standard deviation too, and also add it to the input of
        the block's own head; here only the residual stream that crosses the boundary gets it.
        """
        if not self._spec.boundary_noise:
            return x
        gen = torch.Generator(self._device).manual_seed(
            derive_seed(self._spec.seed, "noise", request.step, request.micro_step, block)
        )
        noise = torch.randn(x.shape, generator=gen, device=x.device)
        return x + self._spec.boundary_noise * x.std() * noise

    def save(self, checkpoint: str) -> None:
        """Copy the state of every block and write it to a checkpoint folder in the background.

        `flush` or a later report returns the files.
        """
        self._writer.save(checkpoint, self._copy_blocks)

    def flush(self) -> tuple[SavedBlocks, ...]:
        """Wait until everything is written. Returns what no report contained. Raises OSError if a file could not be."""
        self._writer.flush()
        return self._writer.finished()

    def _copy_blocks(self) -> dict[int, BlockState]:
        return {k: (t.weights(), t.state_dict()) for k, t in zip(self._blocks, self._trainers, strict=True)}

    def weights(self) -> dict[int, dict[str, Tensor]]:
        """Weights of every block here, on the CPU."""
        return {k: t.weights() for k, t in zip(self._blocks, self._trainers, strict=True)}


def blocks_label(blocks: Sequence[int]) -> str:
    """ "block 2" or "blocks 4-5"."""
    return f"block {blocks[0]}" if len(blocks) == 1 else f"blocks {blocks[0]}-{blocks[-1]}"


def _target_sharing(spec: PretrainSpec, backbone: Backbone, blocks: Sequence[int]) -> dict[int, int]:
    """Block -> the first of `blocks` with the same target and stride, whose target values it shares."""
    keys = {k: (spec.targets[k] if spec.targets else None, backbone.blocks[k].stride) for k in blocks}
    return {k: next(first for first in blocks if keys[first] == keys[k]) for k in blocks}
