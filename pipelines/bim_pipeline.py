"""Pretrain a family of backbones of different depth in one run; see --help."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence

from bim.orchestrator.config.cli import load_settings
from bim.orchestrator.config.schema import Settings, SettingsError
from bim.orchestrator.reporting.log import configure_console

log = logging.getLogger("bim.pipelines.bim_pipeline")


def main(argv: Sequence[str]) -> int:
    """Run the main job. Returns the exit status: 0 done, 1 training failed, 2 bad input, 128 + n stopped by signal n."""
    verbose, quiet = "--verbose" in argv, "--quiet" in argv
    configure_console(verbose, quiet)
    try:
        return run(load_settings(argv), live=not quiet)
    except SettingsError as error:
        return fail(error, 2)
    except KeyboardInterrupt:
        log.info("interrupted before anything was started")
        return 128 + signal.SIGINT


def run(settings: Settings, live: bool = True) -> int:
    """The job for settings that are known to be well-formed. live: whether a terminal shows its progress live."""
    # Ray would print a paragraph for every stage that dies; the loop logs it in a line.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed")
    from bim.orchestrator.jobs.job import BAD_INPUT, run_job  # here: torch takes seconds to import
    from bim.orchestrator.jobs.prepare import prepare
    from bim.orchestrator.reporting.closing import stopped_line
    from bim.orchestrator.reporting.console import console
    from bim.orchestrator.training.errors import TrainingError

    console().quiet = not live
    try:
        result = run_job(prepare(settings))
    except BAD_INPUT as error:
        return fail(error, 2)
    except TrainingError as error:
        return fail(error, 1)
    if result.stopped is not None:
        log.info(stopped_line(result.stopped, result.out))
        return 128 + signal.Signals[result.stopped]
    print("", result.table, "", *result.closing, sep="\n", flush=True)
    return fail("\n".join(result.failed), 1) if result.failed else 0


def fail(error: BaseException | str, status: int) -> int:
    """Print an error, each line as a sentence of its own, without a traceback. Returns `status`."""
    log.error(error)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
