"""What a run will cost, as lines: blocks, stages, time, disk, money."""

from __future__ import annotations

from bim.orchestrator.runs.estimate import RunEstimate
from bim.orchestrator.tables import Key, render
from bim.orchestrator.text import duration, params_text, three_digits, wrapped


def estimate_lines(estimate: RunEstimate, gpus: float, price_per_gpu_hour: float | None) -> list[str]:
    """A table of the blocks, one of the stages, and the times. gpus: of all stages."""
    return [
        *_blocks(estimate).splitlines(),
        "",
        *_stages(estimate).splitlines(),
        "",
        *summary_lines(estimate, gpus, price_per_gpu_hour),
    ]


def summary_lines(estimate: RunEstimate, gpus: float, price_per_gpu_hour: float | None) -> list[str]:
    """Time, disk, money, and the comparison with separate runs."""
    mark = "" if estimate.is_measured else " (estimated)"
    lines = [
        f"about {estimate.images_per_s:.0f} images/s{mark}: {duration(estimate.epoch_s)} an epoch, "
        f"{duration(estimate.training_s)} of training, {duration(estimate.evaluation_s)} of measuring",
        f"checkpoints: {byte_text(estimate.checkpoint_bytes)} of disk",
    ]
    if gpus:
        hours = gpus * (estimate.training_s + estimate.evaluation_s) / 3600
        lines.append(f"GPU hours: {hours:.1f}")
        if price_per_gpu_hour is not None:
            lines[-1] += f", {hours * price_per_gpu_hour:.2f} at {price_per_gpu_hour:g} an hour"
    depths = len(estimate.blocks)
    if depths > 1:
        lines.append(
            f"{depths} separate MAE runs, one for each depth, with the same decoder: {estimate.separate_ratio:.2f} times "
            f"the arithmetic, about {duration(estimate.training_s * estimate.separate_ratio)}"
        )
    return [part for line in lines for part in wrapped(line)]


def byte_text(count: float) -> str:
    """`512 kB`, `3.21 MB`, `1.04 GB`; powers of 1000."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{three_digits(count / size)} {unit}"
    return f"{count / 1e3:.0f} kB"


def _blocks(estimate: RunEstimate) -> str:
    rows: list[dict[Key, str]] = []
    for index, block in enumerate(estimate.blocks):
        memory = block.memory
        rows.append(
            {
                "block": str(index),
                "layers": str(block.layers),
                ("encoder", "params"): params_text(block.encoder_params),
                ("encoder", "GMACs"): three_digits(block.encoder_gmacs),
                ("decoder", "params "): params_text(block.decoder_params),
                ("decoder", "GMACs "): three_digits(block.decoder_gmacs),
                ("memory", "weights"): byte_text(memory.parameters),
                ("memory", "gradients"): byte_text(memory.gradients),
                ("memory", "AdamW"): byte_text(memory.optimizer),
                ("memory", "activations"): byte_text(memory.activations),
            }
        )
    return render(rows)


def _stages(estimate: RunEstimate) -> str:
    return render(
        [
            {
                "stage": str(index),
                "blocks": ", ".join(map(str, blocks)),
                "memory": byte_text(estimate.stage_bytes(index)),
            }
            for index, blocks in enumerate(estimate.stages)
        ]
    )
