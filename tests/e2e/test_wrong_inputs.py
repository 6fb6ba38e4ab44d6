"""Every wrong input of the table: status 2, a sentence for each fault, no traceback, nothing new or changed on the disk."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bim.models.backbones import open_backbone
from bim.orchestrator.runs import resolve
from bim.pipelines import bim_pipeline
from tests.e2e.command import shell
from tests.e2e.wrong_input_files import write_files
from tests.e2e.wrong_inputs import SETTINGS, SHELL, SOURCES, argv_of, cases

MOST_CHARACTERS = 900


@functools.cache
def _opened(*arguments: str) -> Any:
    return open_backbone(*map(eval, arguments))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("wrong")
    write_files(here)
    return here


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory with the files of the cases; they stay as they are."""
    monkeypatch.chdir(folder)
    # Building the same backbone for each image source takes most of the time.
    monkeypatch.setattr(resolve, "open_backbone", lambda *arguments: _opened(*map(repr, arguments)))
    before = _state(folder)
    yield folder
    assert _state(folder) == before


def _state(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Every file and folder with its size, time of change and inode."""
    names = [os.path.join(root, name) for root, dirs, files in os.walk(folder) for name in (*dirs, *files)]
    found = {name: os.lstat(name) for name in (str(folder), *names)}
    return {name: (status.st_size, status.st_mtime_ns, status.st_ino) for name, status in found.items()}


def check(status: int, stdout: str, stderr: str, part: str) -> None:
    lines = stderr.splitlines()
    assert status == 2, stderr
    assert stdout == ""
    assert lines
    assert all(line.startswith("error: ") for line in lines), stderr
    assert "Traceback" not in stderr
    assert max(map(len, lines)) < MOST_CHARACTERS
    assert any(re.search(part, line) for line in lines), f"{part!r} is not in {stderr}"


def arguments(line: str) -> list[str]:
    """With the demo's settings; choosing settings for images takes longer, and is tested by `test_automatic.py`."""
    argv = argv_of(line)
    has_settings = {"--recipe", "--out"} & set(argv) or "--data.source" not in argv
    return ["--search.trials", "0", *([] if has_settings else ["--recipe", "digits_demo"]), *argv]


@pytest.mark.parametrize(("line", "part"), [*cases(SETTINGS), *cases(SOURCES)], ids=lambda text: text[:60])
def test_a_wrong_input_is_a_sentence(line: str, part: str, here: Path) -> None:
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        status = bim_pipeline.main(arguments(line))
    check(status, stdout.getvalue(), stderr.getvalue(), part)


def test_there_are_two_hundred_of_them() -> None:
    lines = [line for line, _ in (*cases(SETTINGS), *cases(SOURCES))]
    assert len(set(lines)) == len(lines) >= 200
    assert set(SHELL) <= set(lines)


@pytest.mark.slow
@pytest.mark.parametrize("line", SHELL)
def test_the_same_in_a_shell(line: str, here: Path) -> None:
    part = dict((*cases(SETTINGS), *cases(SOURCES)))[line]
    done = shell(["--search.trials", "0", *argv_of(line)], here)
    check(done.status, done.stdout, done.stderr, part)
