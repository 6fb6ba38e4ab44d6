"""Writes are whole or not there, and leave nothing else behind."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from bim.orchestrator.files import (
    StorageError,
    atomic_write,
    is_of_folder,
    os_error_text,
    remove_temporary_files,
)
from bim.orchestrator.training.storage import write_probe


def test_a_signal_during_a_write_leaves_the_old_content_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "settings.yaml"
    atomic_write(path, "old")

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_that_is_not_utf8_can_be_written(tmp_path: Path) -> None:
    atomic_write(tmp_path / "names.txt", b"caf\xe9".decode("utf-8", "surrogateescape"))
    assert (tmp_path / "names.txt").read_text(encoding="utf-8") == r"caf\udce9"


def test_what_killed_writers_left_is_removed_at_every_depth(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    for name in (".settings.yaml.12.tmp", "settings.yaml", "notes.tmp"):
        (tmp_path / name).touch()
        (folder / name).touch()
    write_probe(tmp_path)
    (tmp_path / ".evaluation-x.tmp").mkdir()
    (tmp_path / ".evaluation-x.tmp" / "checkpoint").touch()
    remove_temporary_files(tmp_path)
    assert not (tmp_path / ".evaluation-x.tmp").exists()
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        *["notes.tmp"] * 2,
        *["settings.yaml"] * 2,
    ]


@pytest.mark.parametrize(
    ("error", "text", "is_in_run"),
    [
        (
            StorageError(errno.ENOSPC, "cannot be written (full)", "/a/run/x"),
            "/a/run/x cannot be written (full)",
            True,
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/a/run/x"), "/a/run/x: Permission denied", True),
        (PermissionError(errno.EACCES, "Permission denied", b"/a/run"), "/a/run: Permission denied", True),
        (FileExistsError(errno.EEXIST, "File exists", "/b", None, "/a/run/x"), "/b: File exists", True),
        (
            PermissionError(errno.EACCES, "Permission denied", "/a/running"),
            "/a/running: Permission denied",
            False,
        ),
        (OSError(errno.EBADF, "Bad file descriptor", 3), "Bad file descriptor", False),
        (OSError("no such thing"), "no such thing", False),
        (TimeoutError(), "TimeoutError", False),
    ],
)
def test_an_error_of_the_system_is_told_with_its_path(error: OSError, text: str, is_in_run: bool) -> None:
    assert os_error_text(error) == text
    assert is_of_folder(error, Path("/a/run")) is is_in_run
