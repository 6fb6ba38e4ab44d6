"""Tables of pipelines/benchmark.py, of a narrow Swin with one step: their form, and the figures that do not depend on the
load of the machine. And kills of a tiny job's processes, after which it must end equal to the unbroken one.
"""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest

from bim.orchestrator.benchmarks.method_costs import uniform_spec

SCRIPT = Path(__file__).parents[2] / "pipelines" / "benchmark.py"
SWIN = {"img_size": 128, "depths": [1, 1, 2, 1], "embed_dim": 8, "num_heads": [1, 2, 2, 4], "window_size": 4}
FEW = ["--backbone", "swin_tiny_patch4_window7_224", "--batch", "2", "--steps", "1"]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with `SWIN` in every spec."""
    spec = importlib.util.spec_from_file_location("benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    narrow = partial(uniform_spec, model_args=SWIN)
    monkeypatch.setattr("bim.orchestrator.benchmarks.method_costs.uniform_spec", narrow)
    layers = "bim.orchestrator.benchmarks.method_tables.block_layers"
    monkeypatch.setattr(layers, lambda name, blocks: (5,) if blocks == 1 else (1, 1, 2, 1))
    return module


def row(lines: list[str], name: str) -> str:
    (line,) = [line for line in lines if line.startswith(name)]
    return line


@pytest.mark.slow
def test_the_table_of_hierarchical_backbones(
    benchmark: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.main(["green", *FEW]) == 0
    lines = capsys.readouterr().out.splitlines()
    for part in ("encoder alone", "whole step  "):
        assert float(row(lines, part).split()[-1]) < 0.5  # of the activations
    assert "x" in row(lines, "1 block, one mask per sample")
    equal, light = row(lines, "4 blocks, 1x256 decoders"), row(lines, "4 blocks, lighter ones")
    assert float(light.split()[-1]) < float(equal.split()[-1])
    assert float(row(lines, "one mask per batch  ").split()[-2]) > 0


@pytest.mark.slow
def test_the_table_of_plans(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["plans", *FEW]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("block 0, 32 x 32") for line in lines) == 2
    assert float(row(lines, "one mask per sample, full sweep").split()[-1]) > 0


@pytest.mark.slow
def test_an_unknown_kind_of_kill_is_bad_input(
    benchmark: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.main(["faults", "--kinds", "stage,lodaer"]) == 2
    assert "no such kind: lodaer" in capsys.readouterr().err
