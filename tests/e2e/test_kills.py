"""Kills at random moments, of every kind of process: every run ends equal to the unbroken one, and nothing is left."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "pipelines" / "benchmark.py"


@pytest.mark.parametrize(
    "kills", [pytest.param(10, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.nightly)]
)
def test_kills_change_nothing(tmp_path: Path, kills: int) -> None:
    argv = [sys.executable, SCRIPT, "faults", "--kills", str(kills), "--seed", "0", "--work", tmp_path]
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
