from __future__ import annotations

from pathlib import Path

import pytest

from bim.orchestrator.config.recipes import SAVED_SETTINGS
from bim.orchestrator.reporting.closing import (
    closing_lines,
    following_lines,
    several_closing_lines,
    stopped_line,
)
from bim.orchestrator.reporting.comparison import MemberResult
from bim.orchestrator.tracking.records import UiPages

UI = UiPages(None, "http://host:5000/#/view", "http://host:5000/#/run")


def test_the_line_that_opens_a_model_names_the_module_that_registers_it_with_timm() -> None:
    out = Path.cwd() / "runs" / "a"
    timms, own = closing_lines(out, (2, 4), UI), closing_lines(out, (2, 4), UI, "my_parts")
    assert timms[1] == "  timm.create_model('local-dir:runs/a/variants/depth04', pretrained=True)"
    assert own[1:3] == ["  import my_parts  # registers the model with timm", timms[1]]
    assert own[3:] == timms[2:]


def test_the_last_lines_lead_to_the_depths_of_all_runs_and_to_the_run() -> None:
    assert closing_lines(Path("a"), (2, 4), UI)[-2:] == [
        "compare:  http://host:5000/#/view",
        "this run: http://host:5000/#/run",
    ]
    assert closing_lines(Path("a"), (2, 4), UI._replace(command="mlflow ui"))[-3:] == [
        "compare:  mlflow ui, then open",
        "  http://host:5000/#/view",
        "this run: http://host:5000/#/run",
    ]
    assert following_lines(UI) == ["watch it: http://host:5000/#/run"]


@pytest.mark.parametrize(
    ("started_as", "command"),
    [
        ("/opt/venv/bin/bim", "bim pretrain"),
        ("C:/venv/Scripts/bim.exe", "bim pretrain"),
        ("/opt/bim/pipelines/command.py", "python /opt/bim/pipelines/command.py pretrain"),
        ("pipelines/bim_pipeline.py", "python pipelines/bim_pipeline.py"),
        ("/my project/bim_pipeline.py", "python '/my project/bim_pipeline.py'"),
    ],
)
def test_a_run_is_resumed_by_the_command_that_started_it(
    started_as: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", [started_as, "pretrain", "--seed", "1"])
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "a"
    assert stopped_line("SIGINT", out) == "stopped by SIGINT before anything was written"
    out.mkdir()
    (out / SAVED_SETTINGS).touch()
    assert stopped_line("SIGINT", out) == f"stopped by SIGINT; go on with: {command} --out a --resume"
    assert stopped_line("SIGUSR2", out).endswith(f"resume me: {command} --out a --resume")
    failed = MemberResult("vit", "vit_tiny_patch16_224", (32, 32), failed="out of memory")
    assert f"retry failed backbones: {command} --out a --resume" in several_closing_lines(out, [failed], UI)
