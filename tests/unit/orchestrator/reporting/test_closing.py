from __future__ import annotations

from pathlib import Path

from bim.orchestrator.reporting.closing import closing_lines

UI = (None, "http://host:5000/#/experiments/1")


def test_the_line_that_opens_a_model_names_the_module_that_registers_it_with_timm() -> None:
    out = Path.cwd() / "runs" / "a"
    timms, own = closing_lines(out, (2, 4), UI), closing_lines(out, (2, 4), UI, "my_parts")
    assert timms[1] == "  timm.create_model('local-dir:runs/a/variants/depth04', pretrained=True)"
    assert own[1:3] == ["  import my_parts  # registers the model with timm", timms[1]]
    assert own[3:] == timms[2:]
