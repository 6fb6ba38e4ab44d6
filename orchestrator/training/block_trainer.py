"""Training of one block: its local loss, its own backward pass, its own optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from bim.models.local_mim import LocalMIM
from bim.models.masks.plan import MaskPlan
from bim.orchestrator.training.errors import NonFiniteLossError
from bim.orchestrator.training.spec import OptimSpec

UNDECAYED = ("_token", "relative_position_bias_table")
"""Name suffixes of two-dimensional parameters without weight decay (GreenMIM, arXiv 2205.13515, official code)."""

TRANSPORT_DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def decay_groups(parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict]:
    """Two AdamW parameter groups: without decay those of one dimension (norms, biases) and `UNDECAYED`."""
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in parameters:
        if parameter.requires_grad:
            is_undecayed = parameter.squeeze().ndim <= 1 or name.endswith(UNDECAYED)
            (undecayed if is_undecayed else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]


class BlockTrainer:
    """A `LocalMIM` with its optimizer, clipping and precision.

    Args:
        module: the block with its decoder and loss; moved to `device`.
        index: the block's number, for messages.
        optim: optimizer settings.
    """

    def __init__(self, module: LocalMIM, index: int, optim: OptimSpec, device: torch.device) -> None:
        self.module = module.to(device).train()
        self.index = index
        self._optim = optim
        self._device = device
        named = [(n, p) for n, p in self.module.named_parameters() if p.requires_grad]
        self._names = {id(p): n for n, p in named}
        groups = decay_groups(named, optim.weight_decay)
        self._optimizer = torch.optim.AdamW(groups, lr=0.0, betas=optim.betas, fused=True)
        self._scaler = torch.amp.GradScaler(device.type, enabled=optim.precision == "fp16")

    def train_step(
        self,
        x: Tensor,
        images: Tensor,
        plan: MaskPlan,
        *,
        step: int,
        lr: float,
        micro_step: int = 0,
        grad_accum_steps: int = 1,
        targets: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """Forward, local backward, and on the last micro-batch the update.

        Args:
            x: (B, C, H, W) images for block 0, else (B, P + visible, D) of the previous block. Receives no gradient.
            images: (B, C, H, W) normalized images, from which the target is computed.
            targets: the module's `targets(images)`, if computed already.

        Returns:
            The detached residual stream (B, P + visible, D) in the transport dtype, and this micro-batch's metrics.

        Raises:
            NonFiniteLossError: before the weights are touched.
        """
        with self._autocast():
            out = self.module(x, images, plan, targets)
        self._scaler.scale(out.loss / grad_accum_steps).backward()
        measured = {"loss": out.loss.detach(), **out.parts}
        is_update = micro_step == grad_accum_steps - 1
        if is_update:
            self._scaler.unscale_(self._optimizer)
            grads = [p.grad for p in self.module.parameters() if p.grad is not None]
            measured["grad_norm"] = nn.utils.get_total_norm(grads)
        # One transfer for all metrics: each one synchronizes with the device.
        numbers = torch.stack([value.float() for value in measured.values()]).tolist()
        metrics = dict(zip(measured, numbers, strict=True))
        if not math.isfinite(metrics["loss"]):
            raise NonFiniteLossError("loss", self.index, step, lr)
        if is_update:
            if not math.isfinite(metrics["grad_norm"]):
                if not self._scaler.is_enabled():
                    raise NonFiniteLossError("gradient norm", self.index, step, lr)
                del metrics["grad_norm"]  # with fp16 the norm of an overflow is not a metric
            self._update(lr, measured["grad_norm"])
        return out.activations.to(TRANSPORT_DTYPES[self._optim.precision]), metrics

    def _update(self, lr: float, norm: Tensor) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        if self._optim.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(self.module.parameters(), self._optim.clip_grad, norm)
        self._scaler.step(self._optimizer)  # with fp16 an overflow skips only this block's update
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)

    def _autocast(self) -> AbstractContextManager[object]:
        if self._optim.precision == "fp32":
            return nullcontext()
        return torch.autocast(self._device.type, dtype=TRANSPORT_DTYPES[self._optim.precision])

    def weights(self) -> dict[str, Tensor]:
        """A copy of the module's state on the CPU; keys `encoder.*` and `decoder.*`."""
        return {name: _copy_to_cpu(value) for name, value in self.module.state_dict().items()}

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of the optimizer and scaler state as a flat dict of tensors (`exp_avg/<parameter>`, ...).

        It can be written without pickle.
        """
        flat: dict[str, Tensor] = {}
        for parameter, state in self._optimizer.state.items():
            for key, value in state.items():
                flat[f"{key}/{self._names[id(parameter)]}"] = _copy_to_cpu(torch.as_tensor(value))
        if self._scaler.is_enabled():
            scaler = self._scaler.state_dict()
            flat["scaler/scale"] = torch.tensor(scaler["scale"], dtype=torch.float64)
            flat["scaler/growth_tracker"] = torch.tensor(scaler["_growth_tracker"], dtype=torch.int64)
        return flat

    def load(self, weights: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        """Load `weights()` and `state_dict()` of a trainer of the same block.

        Raises:
            RuntimeError: a weight is missing, unknown or of another shape.
            KeyError: the optimizer state of an unknown parameter.
        """
        self.module.load_state_dict(weights)
        if self._scaler.is_enabled() and "scaler/scale" in state:
            current = self._scaler.state_dict()
            scale, growth = float(state["scaler/scale"]), int(state["scaler/growth_tracker"])
            self._scaler.load_state_dict(current | {"scale": scale, "_growth_tracker": growth})
        parameters = (p for group in self._optimizer.param_groups for p in group["params"])
        index = {self._names[id(parameter)]: i for i, parameter in enumerate(parameters)}
        by_index: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            kind, _, name = key.partition("/")
            if kind != "scaler":
                by_index.setdefault(index[name], {})[kind] = value
        self._optimizer.load_state_dict(self._optimizer.state_dict() | {"state": by_index})


def _copy_to_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
