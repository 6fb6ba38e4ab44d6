"""The record of what a run was made from."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from bim.orchestrator.runs.provenance import (
    DataRecord,
    Hardware,
    Machine,
    code_state,
    collect,
    machine,
    package_versions,
)


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "orchestrator").mkdir()
    (tmp_path / "models").mkdir()
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "orchestrator/__init__.py").write_text("x = 1\n")
    (tmp_path / "README.md").write_text("hello\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path


def test_a_clean_checkout_gives_its_commit(checkout: Path) -> None:
    state = code_state(checkout)
    assert state.commit == git(checkout, "rev-parse", "HEAD")
    assert state.dirty is False


def test_a_changed_file_makes_it_dirty(checkout: Path) -> None:
    (checkout / "orchestrator/__init__.py").write_text("x = 2\n")
    assert code_state(checkout).dirty is True


def test_a_new_file_among_the_packages_makes_it_dirty(checkout: Path) -> None:
    (checkout / "models/new.py").write_text("")
    assert code_state(checkout).dirty is True


def test_files_outside_the_packages_do_not_matter(checkout: Path) -> None:
    (checkout / "README.md").write_text("changed\n")
    (checkout / "out.txt").write_text("")
    assert code_state(checkout).dirty is False


def test_an_installed_copy_inside_another_checkout_has_no_commit(checkout: Path) -> None:
    installed = checkout / ".venv/site-packages"
    (installed / "orchestrator").mkdir(parents=True)
    (installed / "orchestrator/__init__.py").write_text("")
    state = code_state(installed)
    assert state.commit is None
    assert state.dirty is None


def test_a_folder_without_git_has_no_commit(tmp_path: Path) -> None:
    assert code_state(tmp_path).commit is None


def test_missing_packages_are_left_out() -> None:
    versions = package_versions(["numpy", "surely-not-installed-anywhere"])
    assert set(versions) == {"numpy"}


def test_the_whole_record_becomes_json() -> None:
    record = collect(data=DataRecord("digits", "abc", 10, 7, 1, 2, classes=10), extra={"cluster": "2 CPU"})
    loaded = json.loads(json.dumps(record.as_dict()))
    assert loaded["data"]["fingerprint"] == "abc"
    assert loaded["packages"]["torch"]
    assert loaded["extra"] == {"cluster": "2 CPU"}
    assert loaded["hardware"]["cpus"] >= 1


def test_hardware_reads_as_one_line() -> None:
    assert str(Hardware("Xeon", 2, 24.0, ())) == "2 x Xeon, 24 GiB, no GPU"
    assert str(Hardware("Xeon", 8, None, ("H200, 140 GiB",))) == "8 x Xeon, H200, 140 GiB"


def test_the_hardware_of_a_run_is_that_of_its_stages() -> None:
    record = collect()
    assert record.hardware_text == str(record.hardware)
    gpu = Hardware("Xeon", 8, 31.0, ("NVIDIA L4, 23034 MiB",))
    stages = [Machine(f"worker-{number}", gpu, "3.12", {"torch": "2.8"}, "12.6") for number in range(4)]
    stages.append(Machine("large", Hardware("EPYC", 64, 500.0, ()), "3.12", {}))
    several = replace(record, stages=(*stages, stages[0]))
    assert several.hardware_text == (
        "4 machines of 8 x Xeon, 31 GiB, NVIDIA L4, 23034 MiB; 64 x EPYC, 500 GiB, no GPU"
    )
    assert json.loads(json.dumps(several.as_dict()))["stages"][0]["cuda"] == "12.6"


def test_a_machine_tells_its_versions() -> None:
    here = machine()
    assert here.packages["torch"]
    assert here.hardware == collect().hardware
