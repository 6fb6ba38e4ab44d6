"""Pretrain a family of backbones of different depth in one run; see --help."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from bim.orchestrator.config.cli import load_settings
from bim.orchestrator.config.schema import Settings, SettingsError


def main(argv: Sequence[str]) -> int:
    """Run the main job. Returns the exit status: 0 done, 1 training failed, 2 bad input, 128 + n stopped by signal n."""
    try:
        return run(load_settings(argv))
    except SettingsError as error:
        return complain(error, 2)
    except KeyboardInterrupt:
        say("interrupted before anything was started")
        return 128 + signal.SIGINT


def run(settings: Settings) -> int:
    """The job for settings that are known to be well-formed."""
    # Ray would print a paragraph for every stage that dies; the loop says it in a line.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed")
    from bim.orchestrator.jobs.job import BAD_INPUT, prepare, run_job
    from bim.orchestrator.jobs.several import prepare_several, run_several
    from bim.orchestrator.reporting.closing import stopped_line
    from bim.orchestrator.training.errors import TrainingError  # here: torch takes seconds to import

    try:
        if settings.backbones is None:
            outcome = run_job(prepare(settings), say)
        else:
            outcome = run_several(prepare_several(settings), say)
    except BAD_INPUT as error:
        return complain(error, 2)
    except TrainingError as error:
        return complain(error, 1)
    if outcome.stopped is not None:
        say(stopped_line(outcome.stopped, outcome.out))
        return 128 + signal.Signals[outcome.stopped]
    say("")
    say(outcome.table)
    say("")
    for line in outcome.closing:
        say(line)
    return complain("\n".join(outcome.failed), 1) if outcome.failed else 0


def say(text: str) -> None:
    """One line for the person at the terminal, at once."""
    print(text, flush=True)


def complain(error: BaseException | str, status: int) -> int:
    """Print an error as the sentences that it consists of, without a traceback. Returns `status`."""
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
