"""The frame of every command: it obeys signals from its first line on, and its output never ends it."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

from bim.orchestrator.reporting.streams import guarded_streams
from bim.orchestrator.runs.signals import command_signals, exit_status
from bim.orchestrator.text import redact
from bim.orchestrator.training.callbacks import StopRequest


def run_command(
    command: Callable[[StopRequest], int], stopped: str = "stopped by {} before anything was started"
) -> int:
    """Run a command; -> its exit status, that of the signal that ended it, or 1 after an error of the program.

    Args:
        command: takes the request that signals fill in, and returns an exit status. What takes long to import is imported
            in it.
        stopped: the line for a signal that the command itself does not answer; `{}` is the signal's name.
    """
    stop = StopRequest()
    with guarded_streams(), command_signals(stop):
        try:
            return command(stop)
        except KeyboardInterrupt:
            stop.reason = stop.reason or "SIGINT"
            print(stopped.format(stop.reason), flush=True)
        except SystemExit:
            if stop.reason is None:  # --help; or Ray's own handler of SIGTERM, while Ray starts
                raise
        except Exception as error:
            # As Python would print it, but for the passwords in addresses.
            sys.stderr.write(redact("".join(traceback.format_exception(error))))
            return 1
        return exit_status(stop.reason)
