"""The console command `bim`: its subcommands are the scripts of this folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

USAGE = """\
usage: bim COMMAND [OPTIONS]

commands
  pretrain    pretrain a family of backbones; the same as python pipelines/bim_pipeline.py
  estimate    what pretrain would do and cost, with the same options; the same as pretrain --dry-run
  sync        send to MLflow what a run could not deliver; the same as python pipelines/sync_tracking.py

bim COMMAND --help lists the options of a command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand. Returns its exit status: 0 done, 2 no such command, otherwise the subcommand's."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name, options = (arguments[0], arguments[1:]) if arguments else ("", [])
    if name in ("--help", "-h"):
        print(USAGE)
        return 0
    if name == "--version":
        from bim.orchestrator.config.cli import version_text

        print(version_text())
        return 0
    if name not in COMMANDS:
        print(USAGE if not name else f"error: unknown command '{name}'\n{USAGE}", file=sys.stderr)
        return 2
    status = COMMANDS[name](options)
    if argv is None:  # the console script
        from bim.orchestrator.runs.signals import leave

        leave(status)
    return status


def _pretrain(options: Sequence[str]) -> int:
    from bim.pipelines.bim_pipeline import main as pretrain

    return pretrain(options)


def _estimate(options: Sequence[str]) -> int:
    return _pretrain([*options, "--dry-run"])


def _sync(options: Sequence[str]) -> int:
    from bim.pipelines.sync_tracking import main as sync

    return sync(options)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "pretrain": _pretrain,
    "estimate": _estimate,
    "sync": _sync,
}


if __name__ == "__main__":
    sys.exit(main())
