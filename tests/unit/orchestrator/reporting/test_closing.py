from __future__ import annotations

from pathlib import Path

from bim.orchestrator.reporting.closing import closing_lines, following_lines
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
