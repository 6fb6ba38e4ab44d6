"""pipelines/benchmark.py on a GPU image with torch and timm only: ray, mlflow and pydantic cannot be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "pipelines" / "benchmark.py"
BLOCKED = ("ray", "mlflow", "pydantic")
RUN = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({BLOCKED!r}))  # None: importing the name raises ImportError
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN, str(SCRIPT), *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--help"], "memory|methods|family|green|plans|pipeline|seeds"),
        pytest.param(
            ["memory", "--backbone", "vit_tiny_patch16_224", "--batch", "1", "--blocks", "2"],
            "peak / K=1",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["help", "memory"],
)
def test_the_benchmark_runs_without_ray_mlflow_and_pydantic(arguments: list[str], expected: str) -> None:
    finished = run(*arguments)
    assert finished.returncode == 0, finished.stderr
    assert expected in finished.stdout


def test_the_blocked_modules_cannot_be_imported() -> None:
    finished = run("pipeline", "--steps", "1")
    assert finished.returncode == 1
    assert "import of ray halted" in finished.stderr
