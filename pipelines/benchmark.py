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
    from bim.orchestrator.benchmarks.method_tables import Workload

Row = dict[Key, str]
"""Cells of a table by column."""


def memory(arguments: argparse.Namespace) -> None:
    """Peak activation memory of a block-wise training step against end-to-end K = 1: same model, decoder, batch."""
    from bim.orchestrator.benchmarks.method_tables import print_memory

    print_memory(arguments.backbone, arguments.blocks, arguments.batch, arguments.mask_ratio)


def methods(arguments: argparse.Namespace) -> None:
    """GMACs, step time and peak activation memory of each method, as ratios to MAE in the same process."""
    from bim.orchestrator.benchmarks.method_tables import print_methods

    print_methods(workload(arguments))


def family(arguments: argparse.Namespace) -> None:
    """Time of one BIM run against separate runs of its depths, and the ratio of their multiply-accumulates."""
    from bim.orchestrator.benchmarks.method_tables import print_family

    print_family(workload(arguments))


def green(arguments: argparse.Namespace) -> None:
    """A hierarchical backbone on visible tokens against the same model on all tokens: encoder and whole step."""
    from bim.orchestrator.benchmarks.method_tables import print_green

    print_green(workload(arguments))


def plans(arguments: argparse.Namespace) -> None:
    """Time of the mask plans of a batch: window groups, and by sampler the tokens that partial decoders decode."""
    from bim.orchestrator.benchmarks.method_tables import print_plans

    print_plans(arguments.backbone, arguments.blocks, arguments.batch, arguments.steps, arguments.throw_ratio)


def workload(arguments: argparse.Namespace) -> Workload:
    """What the arguments say is measured."""
    import torch

    from bim.orchestrator.benchmarks.method_tables import Workload

    return Workload(
        arguments.backbone,
        arguments.blocks,
        arguments.batch,
        arguments.steps,
        torch.device(arguments.device),
        arguments.precision,
    )


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
    from bim.orchestrator.benchmarks.fault_plan import KINDS
    from bim.orchestrator.benchmarks.faults import run_kills

    kinds = KINDS if arguments.kinds is None else tuple(arguments.kinds.split(","))
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        print(f"error: no such kind: {', '.join(unknown)}; there are {', '.join(KINDS)}", file=sys.stderr)
        return 2
    folder = arguments.work or Path(tempfile.mkdtemp(prefix="bim-faults-"))
    folder.mkdir(parents=True, exist_ok=True)
    is_good = run_kills(arguments.kills, arguments.seed, kinds, folder)
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
        "--kills", type=int, default=100, help="in runs of up to eight each (default: %(default)s)"
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
