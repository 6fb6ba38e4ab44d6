"""The console command `bim`."""

from __future__ import annotations

import pytest

from bim.pipelines.command import COMMANDS, main


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)


@pytest.mark.parametrize("argv", [[], ["pretrian"]])
def test_no_command_and_an_unknown_one_are_bad_input(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    assert "usage: bim" in capsys.readouterr().err


def test_pretrain_is_the_main_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--mask.ration", "0.5"]) == 2
    assert "did you mean 'mask.ratio'?" in capsys.readouterr().err
