"""What is installed and declared, and what runs on a bare image.

Who may import whom is held by the import contracts of pyproject.toml.
"""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAYERS = ("models", "orchestrator", "pipelines")

BARE = (
    "bim.orchestrator.benchmarks.activation_memory",
    "bim.orchestrator.benchmarks.method_costs",
    "bim.orchestrator.distributed.placement",
    "bim.orchestrator.evaluation.evaluate",
    "bim.orchestrator.evaluation.model_cost",
    "bim.orchestrator.training.block_trainer",
    "bim.orchestrator.training.build",
    "bim.orchestrator.training.checkpoint",
    "bim.orchestrator.training.depth_variants",
    "bim.orchestrator.training.loop",
    "bim.orchestrator.training.stage_group",
)
"""Modules that run where there is neither Ray nor MLflow nor pydantic: in a notebook, on a bare GPU image."""

ALONE = ("ray", "mlflow", "pydantic")

IMPORT_NAMES = {"pyyaml": "yaml", "scikit-learn": "sklearn", "pillow": "PIL"}
"""Distributions that are imported by another name."""


def files(*layers: str) -> list[Path]:
    return [file for layer in layers for file in sorted((ROOT / layer).rglob("*.py"))]


@functools.cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def packages(file: Path) -> set[str]:
    """Top-level names that a file imports anywhere, functions and type checks included."""
    found: set[str] = set()
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import hides which layer it reaches"
            found.add(str(node.module).partition(".")[0])
    return found


def outside(file: Path) -> set[str]:
    return packages(file) - sys.stdlib_module_names


def test_nothing_of_the_package_imports_its_tests() -> None:
    assert not any("tests" in packages(file) for file in files(*LAYERS))


def test_scripts_define_no_classes() -> None:
    classes = [
        f"{file.name}: {node.name}"
        for file in files("pipelines")
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.ClassDef)
    ]
    assert classes == []


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    declared = import_names(project["dependencies"])
    optional = set().union(
        *(import_names(lines) for name, lines in extras.items() if name not in ("dev", "docs"))
    )
    imported = set().union(*map(outside, files(*LAYERS))) - {"bim"}
    assert declared <= imported <= declared | optional


def import_names(requirements: list[str]) -> set[str]:
    names = (re.split(r"[\[<>=! ]", line, maxsplit=1)[0].lower() for line in requirements)
    return {IMPORT_NAMES.get(name, name) for name in names}


def test_every_folder_with_code_is_installed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {"bim." + str(file.parent.relative_to(ROOT)).replace(os.sep, ".") for file in files(*LAYERS)}
    assert folders == set(settings["packages"])


def test_no_file_bears_a_name_that_says_nothing() -> None:
    empty = {"utils", "util", "helpers", "helper", "common", "core", "base", "misc"}
    names = {file.stem for file in files(*LAYERS)} | {file.parent.name for file in files(*LAYERS)}
    assert names & empty == set()


def test_the_training_loop_and_the_stages_load_neither_ray_nor_mlflow_nor_pydantic() -> None:
    code = "import importlib, json, sys\n"
    code += f"for name in {BARE!r}: importlib.import_module(name)\n"
    code += "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) & set(ALONE) == set()


def test_the_actor_that_loads_batches_starts_without_timm() -> None:
    code = "import sys, bim.orchestrator.distributed.loader_actor; sys.exit('timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_no_script_bears_the_name_of_another_module() -> None:
    # A script's folder comes first on the import path: `select.py` there would break `subprocess`.
    others = sys.stdlib_module_names | importlib.metadata.packages_distributions().keys()
    assert {file.stem for file in (ROOT / "pipelines").glob("*.py")} - {"__init__"} & set(others) == set()


def test_the_contracts_on_imports_are_kept() -> None:
    done = subprocess.run(["lint-imports"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
