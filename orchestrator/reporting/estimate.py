"""What a run will cost, as lines: blocks, stages, time, disk, money."""

from __future__ import annotations

from collections.abc import Sequence

from bim.orchestrator.runs.estimate import seconds_in_turns
from bim.orchestrator.runs.estimate_records import BackboneEstimate, RunEstimate
from bim.orchestrator.tables import Key, render
from bim.orchestrator.text import duration, params_text, short_number, three_digits, wrapped


def estimate_lines(estimate: BackboneEstimate, price_per_gpu_hour: float | None) -> list[str]:
    """A table of the blocks, one of the stages, and the times."""
    return [
        *_blocks(estimate.run).splitlines(),
        "",
        *_stages(estimate.run).splitlines(),
        "",
        *summary_lines(estimate, price_per_gpu_hour),
    ]


def summary_lines(estimate: BackboneEstimate, price_per_gpu_hour: float | None) -> list[str]:
    """Time, disk, money, and the comparison with separate runs."""
    run, search, baseline = estimate.run, estimate.search, estimate.baseline
    mark = "" if run.is_measured else " (estimated)"
    lines = [
        f"about {short_number(run.images_per_s)} images/s{mark}: {duration(run.epoch_s)} an epoch, {_times(run)}"
    ]
    if search is not None:
        lines.append(
            f"search: {search.trials} trials of {search.epochs} epochs before it, about {duration(search.expected_s)}, "
            f"at most {duration(search.longest_s)}, and their scores"
        )
    if baseline is not None:
        lines.append(f"baseline: one end-to-end MAE run after it, {_times(baseline)}")
    if len(lines) > 1:
        lines.append(f"in all about {duration(estimate.total_s)}")
    lines.append(f"checkpoints: {byte_text(estimate.checkpoint_bytes)} of disk")
    lines += _gpu_hours(estimate.gpu_hours, price_per_gpu_hour)
    depths = len(run.blocks)
    if depths > 1:
        lines.append(
            f"{depths} separate MAE runs, one for each depth, with the same decoder: {run.separate_ratio:.2f} times "
            f"the arithmetic, about {duration(run.training_s * run.separate_ratio)}"
        )
    return [part for line in lines for part in wrapped(line)]


def sum_lines(
    estimates: Sequence[BackboneEstimate], concurrent: int, price_per_gpu_hour: float | None
) -> list[str]:
    """Of several backbones. concurrent: how many train at a time."""
    seconds = seconds_in_turns([estimate.total_s for estimate in estimates], concurrent)
    disk = byte_text(sum(estimate.checkpoint_bytes for estimate in estimates))
    at_a_time = f"{concurrent} at a time" if concurrent > 1 else "one after another"
    line = (
        f"all {len(estimates)} backbones, {at_a_time}: about {duration(seconds)}; checkpoints: {disk} of disk"
    )
    hours = _gpu_hours(sum(estimate.gpu_hours for estimate in estimates), price_per_gpu_hour)
    return [part for line in (line, *hours) for part in wrapped(line)]


def _times(run: RunEstimate) -> str:
    parts = [f"{duration(run.training_s)} of training"]
    if run.scores_s:
        parts.append(f"{duration(run.scores_s)} of scores in between")
    return ", ".join([*parts, f"{duration(run.evaluation_s)} of measuring"])


def _gpu_hours(hours: float, price_per_gpu_hour: float | None) -> list[str]:
    if not hours:
        return []
    price = (
        ""
        if price_per_gpu_hour is None
        else f", {hours * price_per_gpu_hour:.2f} at {price_per_gpu_hour:g} an hour"
    )
    return [f"GPU hours: {three_digits(hours)}{price}"]


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
