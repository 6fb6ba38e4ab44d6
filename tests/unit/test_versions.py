"""The bounds of pyproject.toml against the two sets of versions that were tested as a whole."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DEPENDENCIES = [Requirement(text) for text in PROJECT["dependencies"]]
EXTRAS = PROJECT["optional-dependencies"]
BOUNDED = [*DEPENDENCIES, *map(Requirement, [*EXTRAS["optuna"], *EXTRAS["s3"]])]
PIN = re.compile(r"[A-Za-z0-9][\w.-]*==\d[\w.]*")  # no address, no path, no local version


def pins(file: str) -> dict[str, str]:
    """Name as pip normalizes it -> version. Each line that is no comment is `name==version`."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    stated = [line for line in lines if not line.startswith("#")]
    assert [line for line in stated if not PIN.fullmatch(line)] == []
    versions = {canonicalize_name(name): version for name, version in (line.split("==") for line in stated)}
    assert len(versions) == len(stated), "a name stands twice"
    return versions


def lower_bound(requirement: Requirement) -> Version:
    (bound,) = (Version(part.version) for part in requirement.specifier if part.operator == ">=")
    return bound


def test_the_lowest_set_holds_every_lower_bound_and_nothing_else() -> None:
    lowest = {name: Version(version) for name, version in pins("constraints-lowest.txt").items()}
    assert lowest == {canonicalize_name(r.name): lower_bound(r) for r in BOUNDED}


@pytest.mark.parametrize("requirement", DEPENDENCIES, ids=lambda requirement: requirement.name)
def test_the_tested_set_satisfies_every_bound(requirement: Requirement) -> None:
    assert pins("constraints.txt")[canonicalize_name(requirement.name)] in requirement.specifier
