"""Tables of what the methods cost, printed for `pipelines/benchmark.py`: ratios measured in one process."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from bim.models.backbones import open_backbone
from bim.models.masks.sampling import SAMPLERS
from bim.orchestrator.benchmarks import method_costs
from bim.orchestrator.benchmarks.activation_memory import saved_activations
from bim.orchestrator.benchmarks.method_costs import MAE_DECODER, SMALL_DECODER
from bim.orchestrator.evaluation.model_cost import block_gflops, device_name
from bim.orchestrator.tables import Key, render
from bim.orchestrator.training.build import open_spec_backbone
from bim.orchestrator.training.spec import DecoderSpec, Precision, PretrainSpec

Row = dict[Key, str]
"""Cells of a table by column."""

MEMORY_CASES = ((8, 512), (2, 512), (1, 256))
"""Decoder layers, decoder width."""

MASKS = (("one mask per batch", True), ("one mask per sample", False))
"""What a line is about, and its `mask_per_batch`."""


@dataclass(frozen=True)
class Workload:
    """What is measured.

    Args:
        backbone: timm name.
        blocks: K.
        batch: images of a step.
        steps: timed steps, of which the fastest counts.
    """

    backbone: str
    blocks: int
    batch: int
    steps: int
    device: torch.device
    precision: Precision

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers of each block."""
        return block_layers(self.backbone, self.blocks)

    def step_s(self, spec: PretrainSpec) -> float:
        """Seconds of a training step."""
        return method_costs.step_seconds(spec, self.batch, self.device, self.precision, self.steps)[0]

    def cost(self, spec: PretrainSpec) -> method_costs.Cost:
        """The whole cost of a training step."""
        return method_costs.cost(spec, self.batch, self.device, self.precision, self.steps)

    def __str__(self) -> str:
        return f"batch {self.batch}, {device_name(self.device)}, {self.precision}"


def print_memory(backbone: str, blocks: int, batch: int, mask_ratio: float) -> None:
    """Peak activation memory of a step block by block against one end to end, MiB, with decoders of several sizes."""
    print(
        f"{backbone}, batch {batch}, mask ratio {mask_ratio}, float32, saved tensors counted in one process"
    )
    rows: list[Row] = []
    for depth, dim in MEMORY_CASES:
        saved = []
        for k in (1, blocks):
            spec = PretrainSpec(
                backbone=backbone,
                model_args={},
                blocks=block_layers(backbone, k),
                mask_ratios=(mask_ratio,) * k,
                decoders=(DecoderSpec(depth, dim),) * k,
            )
            saved.append(saved_activations(spec, batch))
        (whole,), parts = saved
        row: Row = {"decoder": f"{depth}x{dim}", "K=1, MiB": f"{whole / 2**20:.1f}"}
        row |= {("MiB of block", str(block)): f"{part / 2**20:.1f}" for block, part in enumerate(parts)}
        rows.append(row | {"peak / K=1": f"{max(parts) / whole:.2f}"})
    print(render(rows))


def print_methods(work: Workload) -> None:
    """GMACs, step time and activations of every method, as ratios to MAE."""
    print(f"{work.backbone}, {work}; MAE = 1")
    print(
        f"act: activations held for the backward pass ({work.precision}, largest block), fused | explicit attention; "
        "tensors that do not grow with the batch are left out"
    )
    rows: list[Row] = []
    mae = None
    for method in method_costs.methods(work.backbone, work.layers):
        _announce(method.name)
        cost = work.cost(method.spec)
        mae = mae or cost  # the first method
        ratios = {
            "GMACs": cost.gmacs,
            "ratio": cost.gmacs / mae.gmacs,
            "step": cost.step_s / mae.step_s,
            "act, fused": cost.fused / mae.fused,
            "explicit": cost.explicit / mae.explicit,
        }
        if cost.peak is not None and mae.peak is not None:
            ratios["allocated"] = cost.peak / mae.peak
        rows.append({"method": method.name, **_decimals(ratios), "published": method.published})
    assert mae is not None
    print(render(rows, align="label"))
    print(f"MAE: {1000 * mae.step_s:.0f} ms a step, {mae.fused / 2**20:.0f} | {mae.explicit / 2**20:.0f} MiB")


def print_family(work: Workload) -> None:
    """Time and multiply-accumulates of one run of several depths against a run for each depth."""
    name, layers = work.backbone, work.layers
    separate = {
        "separate runs of its depths, same decoder": method_costs.depth_runs(name, layers, SMALL_DECODER),
        "separate MAE runs, 8x512 decoders": method_costs.depth_runs(name, layers, MAE_DECODER),
    }

    def total(specs: list[PretrainSpec]) -> tuple[float, float]:
        return sum(map(work.step_s, specs)), sum(map(method_costs.forward_gmacs, specs))

    depths = ", ".join(str(sum(layers[: k + 1])) for k in range(len(layers)))
    print(f"{name}, depths {depths}, 1x256 decoders, {work}; equal numbers of steps")
    seconds, gmacs = total([method_costs.uniform_spec(name, layers, SMALL_DECODER)])
    print(f"one BIM run: {1000 * seconds:.0f} ms a step, {gmacs:.2f} GMACs an image")
    rows: list[Row] = []
    for description, specs in separate.items():
        label = f"{len(specs)} {description}"
        _announce(label)
        other_s, other_gmacs = total(specs)
        time_ratio, bound = seconds / other_s, gmacs / other_gmacs
        ratios = {"time": time_ratio, "by MACs": bound, "gap": time_ratio / bound}
        rows.append({"against": label, **_decimals(ratios)})
    print(render(rows, align="label"))


def print_green(work: Workload) -> None:
    """A hierarchical backbone on visible tokens against all tokens, of one block and of several, and its mask plans."""
    name, layers, decoder = work.backbone, (sum(block_layers(work.backbone, 1)),), DecoderSpec(1, 512)
    encodes = ["visible", "all"]
    try:
        open_backbone(name, 1, encode="all")
    except ValueError as error:
        print(f"without the column of all tokens: {error}")
        encodes.remove("all")
    print(f"{name}, 75 % masked, 1x512 decoder on the last level, {work}")
    print("published (GreenMIM, abstract): 2.7 times faster, 70 % less GPU memory")
    costs: dict[str, list[tuple[float, int, int | None]]] = {"encoder alone": [], "whole step": []}
    for encode in encodes:
        _announce(f"{encode} tokens")
        spec = method_costs.uniform_spec(name, layers, decoder, encode=encode)
        costs["encoder alone"].append(
            method_costs.encoder_cost(spec, work.batch, work.device, work.precision, work.steps)
        )
        cost = work.cost(spec)
        costs["whole step"].append((cost.step_s, cost.fused, cost.peak))
    rows: list[Row] = []
    for description, (visible, *full) in costs.items():
        row: Row = {"": description, "visible, ms": f"{1000 * visible[0]:.0f}"}
        for other in full:
            row["all, ms"] = f"{1000 * other[0]:.0f}"
            row["faster"] = f"{other[0] / visible[0]:.2f}x"
            row["activations held"] = f"{visible[1] / other[1]:.2f}"
            if visible[2] is not None and other[2] is not None:
                row["allocated"] = f"{visible[2] / other[2]:.2f}"
        rows.append(row)
    print(render(rows, align="label"))
    single = method_costs.uniform_spec(name, layers, decoder, encode="visible")
    step_s = costs["whole step"][0][0]
    _print_block_counts(work, single, step_s)
    _print_plan_times(single, work.batch, work.steps, step_s)


def _print_block_counts(work: Workload, single: PretrainSpec, step_s: float) -> None:
    """Step times on visible tokens, relative to `step_s`: one block with a mask per sample, several blocks with equal
    decoders, and several blocks with lighter decoders on finer grids.

    single: the spec with one block. step_s: seconds of its step with one mask per batch.
    """
    equal = method_costs.uniform_spec(work.backbone, work.layers, DecoderSpec(1, 256), encode="visible")
    k = f"{len(work.layers)} blocks"
    rows: list[Row] = []
    for description, spec in (
        ("1 block, one mask per sample", replace(single, mask_per_batch=False)),
        (f"{k}, 1x256 decoders", equal),
        (f"{k}, lighter ones on finer grids", method_costs.light_decoders(equal)),
    ):
        _announce(description)
        row: Row = {"one step of": description, "of one block": f"{work.step_s(spec) / step_s:.2f}x"}
        backbone = open_spec_backbone(spec)
        parts = zip(*block_gflops(spec, backbone, backbone.image_size), strict=True)
        gmacs = zip(("GMACs of encoders", "of decoders"), (sum(part) / 2 for part in parts), strict=True)
        rows.append(row | _decimals(dict(gmacs)))
    print(render(rows, align="label"))


def print_plans(backbone: str, blocks: int, batch: int, steps: int, throw_ratio: float) -> None:
    """Milliseconds of the mask plans of a batch, and by sampler of the tokens of a decoder that throws `throw_ratio`."""
    spec = method_costs.uniform_spec(backbone, block_layers(backbone, blocks), SMALL_DECODER)
    print(f"{backbone}, 75 % masked, batch {batch}, {device_name(torch.device('cpu'))}")
    _print_plan_times(spec, batch, steps)
    print(f"tokens of a partial decoder that throws {throw_ratio:g} of all, ms a batch")
    for description, per_batch in MASKS:
        _announce(description)
        masked, rows = replace(spec, mask_per_batch=per_batch), list[Row]()
        for block, (grid, seconds) in enumerate(
            method_costs.sampler_seconds(masked, batch, steps, throw_ratio)
        ):
            milliseconds = {sampler: 1000 * seconds[sampler] for sampler in SAMPLERS}
            rows.append({description: f"block {block}, {grid[0]} x {grid[1]}", **_decimals(milliseconds)})
        print(render(rows, align="label"))


def _print_plan_times(spec: PretrainSpec, batch: int, steps: int, step_s: float | None = None) -> None:
    """Time of the mask plans of a batch, also as a fraction of the seconds of a training step."""
    print(
        "mask plans of a batch, on the CPU; a run prefetches them on another thread during the previous step"
    )
    rows: list[Row] = []
    for description, per_batch in MASKS:
        for sweep in (False, True):
            planned = replace(spec, mask_per_batch=per_batch, sweep_groups=sweep)
            seconds = method_costs.plan_seconds(planned, batch, steps)
            rows.append({"": description + sweep * ", full sweep", "ms": f"{1000 * seconds:.1f}"})
            if step_s:
                rows[-1]["of the step on visible tokens"] = f"{seconds / step_s:.4f}"
    print(render(rows, align="label"))


def block_layers(name: str, blocks: int) -> tuple[int, ...]:
    """Layers of each block of a backbone that is split into `blocks` blocks."""
    return tuple(info.layers for info in open_backbone(name, blocks).blocks)


def _decimals(values: Mapping[str, float]) -> dict[Key, str]:
    return {name: f"{value:.2f}" for name, value in values.items()}


def _announce(part: str) -> None:
    """Say on standard error what is measured now: a table is printed when all of it is."""
    print(f"measuring {part}", file=sys.stderr, flush=True)
