"""The lines that end a command: where the results are, how to open them, how to resume."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from bim.orchestrator.config.recipes import SAVED_SETTINGS
from bim.orchestrator.reporting.comparison import MemberResult
from bim.orchestrator.text import short_path


def closing_lines(out: Path, depths: Sequence[int], ui: str) -> list[str]:
    """Where everything is, and the line that opens the MLflow UI."""
    folder = short_path(out)
    command, _, page = ui.partition("   then open ")
    return [
        f"models:   {folder}/variants/depth{depths[0]:02d} ... depth{depths[-1]:02d}, opened in Python by",
        f"  timm.create_model('local-dir:{folder}/variants/depth{depths[-1]:02d}', pretrained=True)",
        f"results:  {folder}/summary.csv, {folder}/pictures",
        *([f"compare:  {command}, then open", f"  {page}"] if page else [f"compare:  {command}"]),
    ]


def several_closing_lines(out: Path, results: Sequence[MemberResult], ui: str) -> list[str]:
    """`closing_lines` of a run with several backbones."""
    folder, lines = short_path(out), []
    finished = [result for result in results if result.failed is None]
    if finished:
        last = finished[-1]
        depth = last.trained[-1]["depth"]
        lines = closing_lines(out / last.name, [int(row["depth"] or 0) for row in last.trained], ui)[2:]
        lines = [
            f"models:   {folder}/BACKBONE/variants, opened in Python by",
            f"  timm.create_model('local-dir:{folder}/{last.name}/variants/depth{depth:02d}', pretrained=True)",
            f"results:  {folder}/summary.csv, {folder}/pictures/backbones.png",
            *lines[1:],
        ]
    if len(finished) < len(results):
        lines += [
            f"again:    {_resume_command(out)} goes on with those that failed;",
            f"  one that fails for its settings: first remove its folder {folder}/BACKBONE, then change them in --backbones",
        ]
    return lines


def _resume_command(out: Path) -> str:
    return f"python {sys.argv[0]} --out {shlex.quote(short_path(out))} --resume"


def stopped_line(signal_name: str, out: Path) -> str:
    """That a run was ended early, and how to continue it."""
    if not (out / SAVED_SETTINGS).exists():
        return f"stopped by {signal_name} before anything was written"
    return f"stopped by {signal_name}; go on with: {_resume_command(out)}"
