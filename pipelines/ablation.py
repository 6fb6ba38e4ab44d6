"""Train with one part of the method changed at a time, over several seeds, and print the tables; see --help."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import as_completed
from pathlib import Path

from bim.orchestrator.runs.signals import leave
from bim.pipelines.process import run_command


def main(argv: Sequence[str]) -> int:
    """Run the missing cases and print the tables.

    Returns the exit status: 0 done, 1 a case failed, 2 bad input, 75 or 128 + n stopped by a signal.
    """
    return run_command(
        lambda stop: _main(argv), "stopped by {}; the same command goes on with what is missing"
    )


def _main(argv: Sequence[str]) -> int:
    from bim.orchestrator.benchmarks.ablation import (
        CASES,
        EXTRA_MEASUREMENTS,
        ROWS,
        base_digest,
        read_results,
        run_case,
        table,
        write_result,
    )
    from bim.orchestrator.benchmarks.worker_processes import in_worker, worker_pool
    from bim.orchestrator.config.cli import load_settings
    from bim.orchestrator.config.schema import SettingsError

    listed = "".join(f"\n  {name:<12} {description}" for name, (description, _) in CASES.items())
    parser = argparse.ArgumentParser(
        prog="python pipelines/ablation.py",
        description=__doc__,
        epilog=f"Cases:{listed}\n\nFurther --SETTING VALUE pairs change every case (see bim_pipeline.py --help).",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--results",
        type=Path,
        required=True,
        metavar="FILE",
        help="one line of JSON per case and seed; results of other base settings are ignored",
    )
    parser.add_argument("--cases", default=",".join(CASES), help="comma-separated names (default: all)")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated numbers (default: %(default)s)")
    parser.add_argument(
        "--jobs", type=int, default=1, help="processes of one thread each (default: %(default)s)"
    )
    parser.add_argument(
        "--recipe", default="sign_digits", help="base settings of every case (default: %(default)s)"
    )
    arguments, rest = parser.parse_known_args(argv)
    cases, seeds = arguments.cases.split(","), [int(seed) for seed in arguments.seeds.split(",")]
    if unknown := [case for case in cases if case not in CASES]:
        parser.error(f"unknown cases {', '.join(unknown)}; there are {', '.join(CASES)}")
    try:
        base = load_settings(["--recipe", arguments.recipe, *rest])
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    digest = base_digest(base)
    done = {(r.case, r.seed) for r in read_results(arguments.results) if r.base == digest}
    missing = [
        (case, seed)
        for seed in seeds
        for case in cases
        if not done.issuperset((row, seed) for row in (case, *EXTRA_MEASUREMENTS.get(case, ())))
    ]
    failed = 0
    with worker_pool(arguments.jobs) as pool:
        futures = {pool.submit(in_worker, run_case, base, case, seed): (case, seed) for case, seed in missing}
        for future in as_completed(futures):
            case, seed = futures[future]
            try:
                results = future.result()
            except Exception as error:
                failed += 1
                print(f"{case} with seed {seed} failed: {error}", file=sys.stderr, flush=True)
                continue
            for result in results:
                write_result(arguments.results, result)
                scores = "  ".join(
                    f"{score} " + " ".join(f"{100 * value:.1f}" for value in by.values())
                    for score, by in result.scores.items()
                )
                print(f"{result.case:<14} seed {seed}  {scores}  {result.train_s:.0f} s", flush=True)
    print()
    results = [result for result in read_results(arguments.results) if result.base == digest]
    print("\n".join(table(results, ROWS)))
    return 1 if failed else 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
