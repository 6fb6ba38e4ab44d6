"""Who may import whom: pipelines -> orchestrator -> models, and the heavy packages in few places only."""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAYERS = ("models", "orchestrator", "pipelines")

MODELS_MAY_IMPORT = {"torch", "timm", "torchvision", "safetensors", "numpy", "models"}

ALONE = {
    "ray": {
        "orchestrator/ray_stages.py",
        "orchestrator/launch.py",
        "orchestrator/search.py",
        "orchestrator/optuna_searcher.py",
    },
    "mlflow": {
        "orchestrator/tracking.py",
        "orchestrator/tracking_depths.py",
        "orchestrator/tracking_trials.py",
    },
    "pydantic": {"orchestrator/settings.py"},
}
"""Package -> the only files that may import it."""

BARE = (
    "orchestrator.activation_memory",
    "orchestrator.assess",
    "orchestrator.block_trainer",
    "orchestrator.checkpoint",
    "orchestrator.evaluation",
    "orchestrator.failures",
    "orchestrator.family_spec",
    "orchestrator.objective",
    "orchestrator.placement",
    "orchestrator.pretrain",
    "orchestrator.progress",
    "orchestrator.schedules",
    "orchestrator.stages",
    "orchestrator.training_cost",
    "orchestrator.wire",
)
"""Modules that run where there is neither Ray nor MLflow nor pydantic: in a notebook, on a bare GPU image."""

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


def breaches(allowed: dict[str, set[str]]) -> Iterator[str]:
    for file in files(*LAYERS):
        name = str(file.relative_to(ROOT))
        for package in outside(file) & allowed.keys():
            if name not in allowed[package]:
                yield f"{name} imports {package}"


def test_models_import_only_torch_timm_and_what_they_stand_on() -> None:
    found = {str(file.relative_to(ROOT)): outside(file) - MODELS_MAY_IMPORT for file in files("models")}
    assert {name: names for name, names in found.items() if names} == {}


def test_ray_mlflow_and_pydantic_are_imported_in_their_own_files_alone() -> None:
    assert list(breaches(ALONE)) == []


def test_the_files_that_have_a_package_to_themselves_do_import_it() -> None:
    for package, names in ALONE.items():
        assert all(package in packages(ROOT / name) for name in names)


def test_imports_point_from_pipelines_to_orchestrator_to_models() -> None:
    assert not any("pipelines" in packages(file) for file in files("models", "orchestrator"))
    assert not any("orchestrator" in packages(file) for file in files("models"))


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
    names = {re.split(r"[\[<>=! ]", line, maxsplit=1)[0].lower() for line in project["dependencies"]}
    declared = {IMPORT_NAMES.get(name, name) for name in names}
    imported = set().union(*map(outside, files(*LAYERS))) - set(LAYERS)
    assert imported == declared


def test_every_folder_with_code_is_installed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {str(file.parent.relative_to(ROOT)).replace(os.sep, ".") for file in files(*LAYERS)}
    assert folders == set(settings["packages"])


def test_no_file_bears_a_name_that_says_nothing() -> None:
    empty = {"utils", "util", "helpers", "helper", "common", "core", "base", "misc"}
    names = {file.stem for file in files(*LAYERS)} | {file.parent.name for file in files(*LAYERS)}
    assert names & empty == set()


def test_the_training_loop_and_the_stages_load_neither_ray_nor_mlflow_nor_pydantic() -> None:
    code = "import importlib, json, sys\n"
    code += f"for name in {BARE!r}: importlib.import_module(name)\n"
    code += "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) & {*ALONE, "pipelines"} == set()
