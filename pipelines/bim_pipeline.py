"""Pretrain a family of backbones of different depth in one run; see --help."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bim.orchestrator.runs.signals import exit_status, leave
from bim.orchestrator.training.callbacks import StopRequest
from bim.pipelines.process import run_command

# What takes long to import is imported where signals are obeyed.
if TYPE_CHECKING:
    from bim.orchestrator.config.schema import Settings

log = logging.getLogger("bim.pipelines.bim_pipeline")


def main(argv: Sequence[str]) -> int:
    """Run the main job. Returns the exit status.

    0 done, 1 training failed, 2 bad input, 75 stopped by SIGUSR2 and to be resumed, 128 + n stopped by signal n.
    """
    return run_command(lambda stop: _main(argv, stop))


def _main(argv: Sequence[str], stop: StopRequest) -> int:
    from bim.orchestrator.config.cli import load_settings, recipe_file
    from bim.orchestrator.config.schema import SettingsError
    from bim.orchestrator.reporting.log import configure_console
    from bim.orchestrator.training.errors import TrainingError

    verbose, quiet = "--verbose" in argv, "--quiet" in argv
    configure_console(verbose, quiet, on_stderr="--print-config" in argv)
    try:
        settings = load_settings(argv, _automatic, _largest_batch)
        recipe = recipe_file(argv)
        if "--dry-run" in argv:
            return estimate(settings, recipe)
        return run(settings, live=not quiet, stop=stop, recipe=recipe)
    except SettingsError as error:
        return fail(error, 2)
    except TrainingError as error:  # of a probe
        return fail(error, 1)


def _automatic(given: Mapping[str, Any], budget_s: float | None) -> Mapping[str, Any]:
    """See `jobs.automatic.automatic_settings`. Raises SettingsError for everything that is wrong with the input."""
    with _only_settings_errors():
        from bim.orchestrator.jobs.automatic import automatic_settings

        return automatic_settings(given, budget_s)


def _largest_batch(settings: Settings) -> int:
    """See `jobs.automatic.largest_batch_size`. Raises SettingsError for everything that is wrong with the input."""
    with _only_settings_errors():
        from bim.orchestrator.jobs.automatic import largest_batch_size

        return largest_batch_size(settings)


@contextmanager
def _only_settings_errors() -> Iterator[None]:
    """For settings that depend on images and machine: what is wrong with the input is raised as SettingsError.

    A TrainingError of a probe stays what it is.
    """
    from bim.orchestrator.distributed.local_ray import before_ray_is_imported

    before_ray_is_imported()
    from bim.orchestrator.config.schema import SettingsError
    from bim.orchestrator.jobs.job import BAD_INPUT

    try:
        yield
    except BAD_INPUT as error:
        raise SettingsError(str(error)) from error


def estimate(settings: Settings, recipe: Path | None = None) -> int:
    """Print what a job with these settings would do and cost. Returns the exit status.

    recipe: the file that they are from; times that a run left beside it are not measured again.
    """
    from bim.orchestrator.distributed.local_ray import before_ray_is_imported

    before_ray_is_imported()
    from bim.orchestrator.jobs.dry_run import dry_run_lines
    from bim.orchestrator.jobs.job import BAD_INPUT
    from bim.orchestrator.jobs.prepare import prepare
    from bim.orchestrator.runs.step_times import read_times

    if recipe is not None:
        read_times(recipe.parent)
    try:
        print(*dry_run_lines(prepare(settings)), sep="\n", flush=True)
    except BAD_INPUT as error:
        return fail(error, 2)
    return 0


def run(
    settings: Settings, live: bool = True, stop: StopRequest | None = None, recipe: Path | None = None
) -> int:
    """The job for settings that are known to be well-formed.

    Args:
        live: whether a terminal shows its progress live.
        recipe: as in `estimate`.
    """
    from bim.orchestrator.distributed.local_ray import before_ray_is_imported

    before_ray_is_imported()
    from bim.orchestrator.jobs.job import BAD_INPUT, run_job  # here: torch takes seconds to import
    from bim.orchestrator.jobs.prepare import prepare
    from bim.orchestrator.reporting.closing import stopped_line
    from bim.orchestrator.reporting.console import console
    from bim.orchestrator.runs.step_times import read_times
    from bim.orchestrator.training.errors import TrainingError

    console().quiet = not live
    if recipe is not None:
        read_times(recipe.parent)
    try:
        result = run_job(prepare(settings), stop)
    except BAD_INPUT as error:
        return fail(error, 2)
    except TrainingError as error:
        return fail(error, 1)
    if result.stopped is not None:
        log.info(stopped_line(result.stopped, result.out))
        return exit_status(result.stopped)
    print("", result.table, "", *result.closing, sep="\n", flush=True)
    return fail("\n".join(result.failed), 1) if result.failed else 0


def fail(error: BaseException | str, status: int) -> int:
    """Print an error, each line as a sentence of its own, without a traceback. Returns `status`."""
    log.error(error)
    return status


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
