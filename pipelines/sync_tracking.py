"""Send to MLflow what a run that has ended could not deliver, and close the run there; see --help."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from bim.orchestrator.reporting.log import configure_console
from bim.orchestrator.runs.signals import leave
from bim.pipelines.process import run_command

log = logging.getLogger("bim.pipelines.sync_tracking")

DESCRIPTION = """\
Send to MLflow what a run that has ended could not deliver, and close the run there.

A run whose store is slow, away, read-only or full goes on, and keeps what it records in OUT. It is sent as
soon as the store answers, by the run itself, by its --resume, or by this command. A run that was killed is
closed as KILLED; --resume opens it again."""


def main(argv: Sequence[str]) -> int:
    """Sync an output directory.

    Returns the exit status: 0 all is sent, 1 something is left, 2 bad input, 75 or 128 + n stopped by a signal.
    """
    return run_command(lambda stop: _main(argv), "stopped by {}; what is left stays where it is")


def _main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python pipelines/sync_tracking.py",
        description=DESCRIPTION,
        epilog="exit status: 0 everything is sent, 1 something is left, 2 wrong input",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="the --out of the run; of several backbones that of all"
    )
    parser.add_argument(
        "--tracking.uri",
        dest="uri",
        metavar="URI",
        help="the store, if OUT does not know its password or its present address",
    )
    arguments = parser.parse_args(argv)
    configure_console()
    return run(arguments.out.expanduser().absolute(), arguments.uri)


def run(out: Path, uri: str | None = None) -> int:
    """The command for arguments that are well-formed."""
    # Here: MLflow takes a second to import.
    from bim.orchestrator.runs.lease import LeaseHeldError, acquire
    from bim.orchestrator.text import short_path
    from bim.orchestrator.tracking.store import TrackingError
    from bim.orchestrator.tracking.sync import StoreUnavailableError, recorded_folders, sync_run

    status = 0
    try:
        folders = recorded_folders(out)
        with acquire(out, "bim sync"):
            for folder in folders:
                try:
                    synced = sync_run(folder, uri)
                except StoreUnavailableError as error:
                    log.error(error)
                    status = 1
                else:
                    outcome = (
                        f"sent {synced.num_sent} metrics and uploads"
                        if synced.num_sent
                        else "nothing was left"
                    )
                    log.info("%s: %s; the run is %s", short_path(folder), outcome, synced.status)
    except LeaseHeldError as error:
        log.error(
            "%s is in use by %s; a run that is alive sends what it records itself", short_path(out), error
        )
        return 2
    except (TrackingError, OSError) as error:
        log.error(error)
        return 2
    return status


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
