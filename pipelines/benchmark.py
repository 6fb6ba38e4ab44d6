"""Print the cost of the methods and of the pipeline, as ratios measured in one process; see --help."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bim.orchestrator.runs.signals import leave
from bim.orchestrator.tables import Key, render
from bim.pipelines.process import run_command

if TYPE_CHECKING:
    import torch

    from bim.orchestrator.training.spec import PretrainSpec

Row = dict[Key, str]
"""Cells of a table by column."""

MEMORY_CASES = ((8, 512), (2, 512), (1, 256))
"""Decoder layers, decoder width."""


def memory(arguments: argparse.Namespace) -> None:
    """Peak activation memory of a block-wise training step against end-to-end K = 1: same model, decoder, batch."""
    from bim.models.backbones import open_backbone
    from bim.orchestrator.benchmarks.activation_memory import saved_activations
    from bim.orchestrator.training.spec import DecoderSpec, PretrainSpec

    name, batch, k = arguments.backbone, arguments.batch, arguments.blocks
    print(
        f"{name}, batch {batch}, mask ratio {arguments.mask_ratio}, float32, saved tensors counted in one process"
    )
    rows: list[Row] = []
    for depth, dim in MEMORY_CASES:
        saved = []
        for blocks in (1, k):
            sizes = tuple(info.layers for info in open_backbone(name, blocks).blocks)
            spec = PretrainSpec(
                backbone=name,
                model_args={},
                blocks=sizes,
                mask_ratios=(arguments.mask_ratio,) * blocks,
                decoders=(DecoderSpec(depth, dim),) * blocks,
            )
            saved.append(saved_activations(spec, batch))
        (whole,), parts = saved
        row: Row = {"decoder": f"{depth}x{dim}", "K=1, MiB": f"{whole / 2**20:.1f}"}
        row |= {("MiB of block", str(block)): f"{part / 2**20:.1f}" for block, part in enumerate(parts)}
        rows.append(row | {"peak / K=1": f"{max(parts) / whole:.2f}"})
    print(render(rows))


def methods(arguments: argparse.Namespace) -> None:
    """GMACs, step time and peak activation memory of each method, as ratios to MAE in the same process."""
    import torch

    from bim.orchestrator.benchmarks import method_costs

    device, precision = torch.device(arguments.device), arguments.precision
    layers = block_layers(arguments.backbone, arguments.blocks)
    print(f"{arguments.backbone}, batch {arguments.batch}, {describe(device)}, {precision}; MAE = 1")
    print(
        f"act: activations held for the backward pass ({precision}, largest block), fused | explicit attention; "
        "tensors that do not grow with the batch are left out"
    )
    rows: list[Row] = []
    mae = None
    for method in method_costs.methods(arguments.backbone, layers):
        announce(method.name)
        cost = method_costs.cost(method.spec, arguments.batch, device, precision, arguments.steps)
        mae = mae or cost  # the first method
        row: Row = {
            "method": method.name,
            "GMACs": f"{cost.gmacs:.2f}",
            "ratio": f"{cost.gmacs / mae.gmacs:.2f}",
            "step": f"{cost.step_s / mae.step_s:.2f}",
            "act, fused": f"{cost.fused / mae.fused:.2f}",
            "explicit": f"{cost.explicit / mae.explicit:.2f}",
        }
        if cost.peak is not None and mae.peak is not None:
            row["allocated"] = f"{cost.peak / mae.peak:.2f}"
        rows.append(row | {"published": method.published})
    assert mae is not None
    print(render(rows, align="label"))
    print(f"MAE: {1000 * mae.step_s:.0f} ms a step, {mae.fused / 2**20:.0f} | {mae.explicit / 2**20:.0f} MiB")


def family(arguments: argparse.Namespace) -> None:
    """Time of one BIM run against separate runs of its depths, and the ratio of their multiply-accumulates."""
    import torch

    from bim.orchestrator.benchmarks.method_costs import (
        MAE_DECODER,
        SMALL_DECODER,
        depth_runs,
        forward_gmacs,
        step_seconds,
        uniform_spec,
    )

    device, precision = torch.device(arguments.device), arguments.precision
    name, layers = arguments.backbone, block_layers(arguments.backbone, arguments.blocks)
    separate = {
        "separate runs of its depths, same decoder": depth_runs(name, layers, SMALL_DECODER),
        "separate MAE runs, 8x512 decoders": depth_runs(name, layers, MAE_DECODER),
    }

    def total(specs: list[PretrainSpec]) -> tuple[float, float]:
        seconds = [
            step_seconds(spec, arguments.batch, device, precision, arguments.steps)[0] for spec in specs
        ]
        return sum(seconds), sum(forward_gmacs(spec) for spec in specs)

    depths = ", ".join(str(sum(layers[: k + 1])) for k in range(len(layers)))
    print(
        f"{name}, depths {depths}, 1x256 decoders, batch {arguments.batch}, {describe(device)}, {precision}; equal "
        "numbers of steps"
    )
    seconds, gmacs = total([uniform_spec(name, layers, SMALL_DECODER)])
    print(f"one BIM run: {1000 * seconds:.0f} ms a step, {gmacs:.2f} GMACs an image")
    rows: list[Row] = []
    for description, specs in separate.items():
        label = f"{len(specs)} {description}"
        announce(label)
        other_s, other_gmacs = total(specs)
        time_ratio, bound = seconds / other_s, gmacs / other_gmacs
        gap = time_ratio / bound
        rows.append(
            {"against": label, "time": f"{time_ratio:.2f}", "by MACs": f"{bound:.2f}", "gap": f"{gap:.2f}"}
        )
    print(render(rows, align="label"))


def green(arguments: argparse.Namespace) -> None:
    """A hierarchical backbone on visible tokens against the same model on all tokens: encoder and whole step."""
    import torch

    from bim.models.backbones import open_backbone
    from bim.orchestrator.benchmarks import method_costs
    from bim.orchestrator.training.spec import DecoderSpec

    device, precision, name = torch.device(arguments.device), arguments.precision, arguments.backbone
    layers = (sum(block_layers(name, 1)),)
    decoder = DecoderSpec(1, 512)
    encodes = ["visible", "all"]
    try:
        open_backbone(name, 1, encode="all")
    except ValueError as error:
        print(f"without the column of all tokens: {error}")
        encodes.remove("all")
    print(
        f"{name}, 75 % masked, 1x512 decoder on the last level, batch {arguments.batch}, {describe(device)}, {precision}"
    )
    print("published (GreenMIM, abstract): 2.7 times faster, 70 % less GPU memory")
    costs: dict[str, list[tuple[float, int, int | None]]] = {"encoder alone": [], "whole step": []}
    for encode in encodes:
        announce(f"{encode} tokens")
        spec = method_costs.uniform_spec(name, layers, decoder, encode=encode)
        measured = (spec, arguments.batch, device, precision, arguments.steps)
        costs["encoder alone"].append(method_costs.encoder_cost(*measured))
        cost = method_costs.cost(*measured)
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
    print_block_counts(arguments, device, single, step_s)
    print_plans(single, arguments.batch, arguments.steps, step_s)


def print_block_counts(
    arguments: argparse.Namespace, device: torch.device, single: PretrainSpec, step_s: float
) -> None:
    """Step times on visible tokens, relative to `step_s`: one block with a mask per sample, several blocks with equal
    decoders, and several blocks with lighter decoders on finer grids.

    single: the spec with one block. step_s: seconds of its step with one mask per batch.
    """
    from dataclasses import replace

    from bim.orchestrator.benchmarks.method_costs import light_decoders, step_seconds, uniform_spec
    from bim.orchestrator.evaluation.model_cost import block_gflops
    from bim.orchestrator.training.build import open_spec_backbone
    from bim.orchestrator.training.spec import DecoderSpec

    layers = block_layers(arguments.backbone, arguments.blocks)
    equal = uniform_spec(arguments.backbone, layers, DecoderSpec(1, 256), encode="visible")
    k = f"{len(layers)} blocks"
    rows: list[Row] = []
    for description, spec in (
        ("1 block, one mask per sample", replace(single, mask_per_batch=False)),
        (f"{k}, 1x256 decoders", equal),
        (f"{k}, lighter ones on finer grids", light_decoders(equal)),
    ):
        announce(description)
        seconds, _ = step_seconds(spec, arguments.batch, device, arguments.precision, arguments.steps)
        backbone = open_spec_backbone(spec)
        parts = zip(*block_gflops(spec, backbone, backbone.image_size), strict=True)
        encoders, decoders = (sum(part) / 2 for part in parts)
        rows.append(
            {
                "one step of": description,
                "of one block": f"{seconds / step_s:.2f}x",
                "GMACs of encoders": f"{encoders:.2f}",
                "of decoders": f"{decoders:.2f}",
            }
        )
    print(render(rows, align="label"))


def plans(arguments: argparse.Namespace) -> None:
    """Time of the mask plans of a batch: window groups, and by sampler the tokens that partial decoders decode."""
    from dataclasses import replace

    import torch

    from bim.models.masks.sampling import SAMPLERS
    from bim.orchestrator.benchmarks.method_costs import SMALL_DECODER, sampler_seconds, uniform_spec

    name, batch, steps = arguments.backbone, arguments.batch, arguments.steps
    spec = uniform_spec(name, block_layers(name, arguments.blocks), SMALL_DECODER)
    print(f"{name}, 75 % masked, batch {batch}, {describe(torch.device('cpu'))}")
    print_plans(spec, batch, steps)
    print(f"tokens of a partial decoder that throws {arguments.throw_ratio:g} of all, ms a batch")
    for description, per_batch in (("one mask per batch", True), ("one mask per sample", False)):
        announce(description)
        masked, rows = replace(spec, mask_per_batch=per_batch), list[Row]()
        for block, (grid, times) in enumerate(sampler_seconds(masked, batch, steps, arguments.throw_ratio)):
            row: Row = {description: f"block {block}, {grid[0]} x {grid[1]}"}
            rows.append(row | {sampler: f"{1000 * times[sampler]:.2f}" for sampler in SAMPLERS})
        print(render(rows, align="label"))


def print_plans(spec: PretrainSpec, batch: int, steps: int, step_s: float | None = None) -> None:
    """Time of the mask plans of a batch, also as a fraction of the seconds of a training step."""
    from dataclasses import replace

    from bim.orchestrator.benchmarks.method_costs import plan_seconds

    print(
        "mask plans of a batch, on the CPU; a run prefetches them on another thread during the previous step"
    )
    rows: list[Row] = []
    for description, per_batch in (("one mask per batch", True), ("one mask per sample", False)):
        for sweep in (False, True):
            seconds = plan_seconds(replace(spec, mask_per_batch=per_batch, sweep_groups=sweep), batch, steps)
            row: Row = {"": description + sweep * ", full sweep", "ms": f"{1000 * seconds:.1f}"}
            rows.append(
                row | ({"of the step on visible tokens": f"{seconds / step_s:.4f}"} if step_s else {})
            )
    print(render(rows, align="label"))


def block_layers(name: str, blocks: int) -> tuple[int, ...]:
    """Layers of each block of a backbone that is split into `blocks` blocks."""
    from bim.models.backbones import open_backbone

    return tuple(info.layers for info in open_backbone(name, blocks).blocks)


def announce(part: str) -> None:
    """Say on standard error what is measured now: a table is printed when all of it is."""
    print(f"measuring {part}", file=sys.stderr, flush=True)


def describe(device: torch.device) -> str:
    """The device's name, for the head of a table."""
    from bim.orchestrator.evaluation.model_cost import device_name

    return device_name(device)


def pipeline(arguments: argparse.Namespace) -> None:
    """Throughput of stages with equal work on Ray, as a fraction of a single stage, and the driver's CPU time."""
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"):
        os.environ.setdefault(name, "0")
    from bim.orchestrator.distributed.local_ray import secure_local_ray

    secure_local_ray()
    from bim.orchestrator.benchmarks.pipeline_speed import pipeline_speed
    from bim.orchestrator.distributed.cluster import ray_cluster

    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logging.getLogger("bim").setLevel(logging.INFO)
    with ray_cluster() as cluster:
        print(
            f"{arguments.stages} stages that sleep {arguments.work_ms:g} ms, {arguments.steps} steps, on Ray"
        )
        rows: list[Row] = []
        for megabytes in (0.0, 10.0):
            speed = pipeline_speed(
                arguments.stages,
                arguments.work_ms / 1000,
                int(megabytes * 1e6),
                arguments.steps,
                cluster.cpus,
            )
            rows.append(
                {
                    "per hop": f"{megabytes:.0f} MB",
                    "fraction of one stage": f"{speed.efficiency:.3f}",
                    "steps/s": f"{speed.steps_per_s:.1f}",
                    "driver's CPU ms per step and stage": f"{speed.driver_ms:.3f}",
                }
            )
        print(render(rows))


def seeds(arguments: argparse.Namespace) -> None:
    """Improvement of every depth over its random start, over the output directories of several runs."""
    from bim.orchestrator.reporting.summary import improvements_over_random

    runs = [json.loads((folder / "summary.json").read_text(encoding="utf-8")) for folder in arguments.runs]
    print(f"{len(runs)} runs; percentage points; standard error of one run, trained and random combined")
    rows: list[Row] = [
        {
            "metric": lead.metric,
            "depth": str(lead.depth),
            "mean lead": f"{100 * lead.mean:.1f}",
            "standard error": f"{100 * lead.error:.1f}",
            "lead / error": f"{lead.mean / lead.error:.1f}",
            "least lead": f"{100 * lead.min_difference:.1f}",
        }
        for lead in improvements_over_random(runs)
    ]
    print(render(rows, align="label"))


def faults(arguments: argparse.Namespace) -> int:
    """Kill processes of a tiny job at random moments: every run must end equal to the unbroken one, nothing left over.

    Returns 1 if a run does not.
    """
    from bim.orchestrator.benchmarks.fault_run import KINDS
    from bim.orchestrator.benchmarks.faults import run_kills

    kinds = KINDS if arguments.kinds is None else tuple(arguments.kinds.split(","))
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        print(f"error: no such kind: {', '.join(unknown)}; there are {', '.join(KINDS)}", file=sys.stderr)
        return 2
    folder = arguments.work or Path(tempfile.mkdtemp(prefix="bim-faults-"))
    folder.mkdir(parents=True, exist_ok=True)
    reports = run_kills(arguments.kills, arguments.seed, kinds, folder)
    is_good = all(report.is_good for report in reports)
    if is_good and arguments.work is None:
        shutil.rmtree(folder)
    else:
        print(f"output directories: {folder}")
    return 0 if is_good else 1


def main(argv: Sequence[str]) -> int:
    """Run one benchmark and print its table. Returns the exit status; 75 or 128 + n after a signal."""
    return run_command(lambda stop: _main(argv), "stopped by {}")


def _main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python pipelines/benchmark.py", description=__doc__, allow_abbrev=False
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="memory|methods|family|green|plans|pipeline|seeds|faults"
    )

    def command(run: Callable[[argparse.Namespace], int | None]) -> argparse.ArgumentParser:
        command = commands.add_parser(
            run.__name__, help=run.__doc__, description=run.__doc__, allow_abbrev=False
        )
        command.set_defaults(run=run)
        return command

    def model_command(
        run: Callable[[argparse.Namespace], None], backbone: str, batch: int = 8
    ) -> argparse.ArgumentParser:
        model = command(run)
        model.add_argument("--backbone", default=backbone, help="timm name (default: %(default)s)")
        model.add_argument("--batch", type=int, default=batch, help="images (default: %(default)s)")
        model.add_argument("--blocks", type=int, default=4, help="K (default: %(default)s)")
        return model

    vit, swin = "vit_base_patch16_224", "swin_base_patch4_window7_224"
    model_command(memory, vit).add_argument(
        "--mask-ratio", type=float, default=0.75, help="(default: %(default)s)"
    )
    for run, backbone in ((methods, vit), (family, vit), (green, swin)):
        timed = model_command(run, backbone)
        timed.add_argument("--steps", type=int, default=3, help="timed steps (default: %(default)s)")
        timed.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
        timed.add_argument(
            "--precision", default="fp32", choices=["fp32", "bf16"], help="(default: %(default)s)"
        )
    planned = model_command(plans, swin, batch=16)
    planned.add_argument("--throw-ratio", type=float, default=0.5, help="(default: %(default)s)")
    planned.add_argument("--steps", type=int, default=5, help="timed plans (default: %(default)s)")
    sleeping = command(pipeline)
    sleeping.add_argument("--stages", type=int, default=4, help="(default: %(default)s)")
    sleeping.add_argument(
        "--work-ms", type=float, default=20.0, help="sleep of a stage per step (default: %(default)s)"
    )
    sleeping.add_argument("--steps", type=int, default=400, help="timed steps (default: %(default)s)")
    command(seeds).add_argument(
        "runs", nargs="+", type=Path, metavar="OUT", help="output directory of a finished run"
    )

    killing = command(faults)
    killing.add_argument(
        "--kills", type=int, default=100, help="runs with one kill each (default: %(default)s)"
    )
    killing.add_argument("--seed", type=int, default=0, help="of kinds and moments (default: %(default)s)")
    killing.add_argument(
        "--kinds",
        help="what is killed, joined by commas: stage, loader, data-worker, driver, raylet, mlflow-server (default: all)",
    )
    killing.add_argument(
        "--work", type=Path, metavar="DIR", help="folder of the runs, which stays (default: a temporary one)"
    )

    arguments = parser.parse_args(argv)
    return arguments.run(arguments) or 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
