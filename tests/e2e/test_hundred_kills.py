"""A hundred kills at random moments, of every kind of process: every run ends equal to the unbroken one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "pipelines" / "benchmark.py"


@pytest.mark.nightly
def test_a_hundred_kills_change_nothing(tmp_path: Path) -> None:
    argv = [sys.executable, SCRIPT, "faults", "--kills", "100", "--seed", "0", "--work", tmp_path]
    assert subprocess.run(argv, check=False).returncode == 0
