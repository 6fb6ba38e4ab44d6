"""The lines at the end of a command: where the results are, how to open them, how to resume."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from bim.orchestrator.config.recipes import SAVED_SETTINGS
from bim.orchestrator.reporting.comparison import MemberResult
from bim.orchestrator.text import short_path


class Ui(Protocol):
    """MLflow's pages of a run; `bim.orchestrator.tracking.records.UiPages` is one."""

    @property
    def command(self) -> str | None:
        """The command that starts them; None if a server shows them already."""

    @property
    def variants(self) -> str:
        """The address of the depths of all runs."""

    @property
    def run(self) -> str:
        """The address of the run."""


def closing_lines(out: Path, depths: Sequence[int], ui: Ui, module: str | None = None) -> list[str]:
    """Where the results are.

    Args:
        ui: the pages of MLflow.
        module: that registers the model with timm, if it is not timm's.
    """
    folder = short_path(out)
    variants = f"{folder}/variants/depth{depths[0]:02d} ... depth{depths[-1]:02d}"
    return _lines(
        variants,
        f"{folder}/variants/depth{depths[-1]:02d}",
        f"{folder}/summary.csv, {folder}/pictures",
        ui,
        module,
    )


def several_closing_lines(out: Path, results: Sequence[MemberResult], ui: Ui) -> list[str]:
    """`closing_lines` of a run with several backbones."""
    folder, lines = short_path(out), []
    finished = [result for result in results if result.failed is None]
    if finished:
        example = f"{folder}/{finished[-1].name}/variants/depth{finished[-1].trained[-1]['depth']:02d}"
        files = f"{folder}/summary.csv, {folder}/pictures/backbones.png"
        lines = _lines(f"{folder}/BACKBONE/variants", example, files, ui)
    if len(finished) < len(results):
        lines += [
            f"retry failed backbones: {_resume_command(out)}",
            f"  to change the settings of one in --backbones, first remove its folder {folder}/BACKBONE",
        ]
    return lines


def _lines(variants: str, example: str, files: str, ui: Ui, module: str | None = None) -> list[str]:
    return [
        f"models:   {variants}, opened in Python by",
        *([] if module is None else [f"  import {module}  # registers the model with timm"]),
        f"  timm.create_model('local-dir:{example}', pretrained=True)",
        f"results:  {files}",
        *_page("compare:  ", ui.command, ui.variants),
        f"this run: {ui.run}",
    ]


def following_lines(ui: Ui) -> list[str]:
    """Where a run that begins can be watched."""
    return _page("watch it: ", ui.command, ui.run)


def _page(label: str, command: str | None, page: str) -> list[str]:
    return [f"{label}{page}"] if command is None else [f"{label}{command}, then open", f"  {page}"]


def _resume_command(out: Path) -> str:
    return f"{_pretrain_command()} --out {shlex.quote(short_path(out))} --resume"


def _pretrain_command() -> str:
    """How this process was started, without options: by the console command `bim`, its module, or a script."""
    script = Path(sys.argv[0])
    if script.stem == "bim":
        return "bim pretrain"
    subcommand = " pretrain" if script.name == "command.py" else ""
    return f"python {shlex.quote(sys.argv[0])}{subcommand}"


def stopped_line(signal_name: str, out: Path) -> str:
    """For a run that a signal stopped: how to continue it."""
    if not (out / SAVED_SETTINGS).exists():
        return f"stopped by {signal_name} before anything was written"
    if signal_name == "SIGUSR2":
        return f"stopped by SIGUSR2 to be resumed; resume me: {_resume_command(out)}"
    return f"stopped by {signal_name}; go on with: {_resume_command(out)}"
