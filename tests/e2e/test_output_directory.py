"""The output directory through the whole command: held, damaged, full, begun from weights that are gone."""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bim.orchestrator.runs.lease import LEASE, acquire
from tests.e2e.command import Finished, call, main_job, tree

SHORT = {"schedule__epochs": "2", "checkpoint__every_epochs": "1"}


def sentence(done: Finished, status: int) -> str:
    assert done.status == status, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert "Traceback" not in done.stdout
    return line.removeprefix("error: ")


@pytest.fixture
def finished(tmp_path: Path, brief: Finished) -> Path:
    """A run that has ended, to be spoiled."""
    return Path(shutil.copytree(brief.out, tmp_path / "run"))


def test_a_directory_that_another_process_holds_is_refused_and_the_process_named(finished: Path) -> None:
    with acquire(finished, "run"):
        before = tree(finished)
        for argv in (["--out", str(finished), "--resume"], ["--out", str(finished)]):
            told = sentence(call(argv), 2)
            assert re.search(
                rf"in use by process {os.getpid()} on \S+ \(since .*; wait until it has ended", told
            )
        assert tree(finished) == before


def test_a_run_whose_checkpoints_cannot_be_read_is_not_begun_again(finished: Path) -> None:
    for manifest in finished.glob("checkpoints/*/manifest.json"):
        manifest.write_text("[]")
    before = tree(finished)
    told = sentence(call(["--out", str(finished), "--resume"]), 2)
    assert "step-00000010: unreadable manifest (it is not a JSON object)" in told
    assert "--resume --from-scratch" in told
    assert tree(finished) == before


@pytest.mark.slow
def test_from_scratch_begins_again_and_keeps_what_it_could_not_read(finished: Path) -> None:
    for manifest in finished.glob("checkpoints/*/manifest.json"):
        manifest.write_text("[]")
    done = call(["--out", str(finished), "--resume", "--from-scratch"])
    assert done.status == 0, done.stderr
    assert len(list(finished.glob("checkpoints.unreadable-*/step-*/manifest.json"))) == 2
    assert "from_scratch: false" in (finished / "settings.yaml").read_text()


@pytest.mark.parametrize("name", ["run.json", "settings.yaml"])
def test_a_directory_in_the_place_of_a_file_is_a_sentence(finished: Path, name: str) -> None:
    (finished / name).unlink()
    (finished / name).mkdir()
    done = call(["--out", str(finished), "--resume"])
    assert done.status in (1, 2)
    assert name in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "name",
    [
        "block-1.safetensors",
        pytest.param("run.json", marks=pytest.mark.slow),
        pytest.param("settings.yaml", marks=pytest.mark.slow),
        pytest.param("manifest.json", marks=pytest.mark.slow),
        pytest.param("config.json", marks=pytest.mark.slow),
        pytest.param("summary.json", marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_is_a_sentence_with_the_checkpoint_that_stays(
    tmp_path: Path, unlabeled: Path, store: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def replace(source: Any, target: Any) -> None:
        # The first checkpoint is still written.
        is_first = "step-00000005" in str(target)
        if Path(target).name == name and not is_first:
            raise OSError(28, "No space left on device")
        os.rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    done = main_job(tmp_path / "run", unlabeled, store, **SHORT)
    told = sentence(done, 1)
    assert re.search(rf"run/.*{name} cannot be written \(No space left on device\); ", told)
    if name in ("run.json", "settings.yaml"):
        assert told.endswith("; the run has not begun")
        assert not done.out.exists()
        return
    stays = re.search(r"last checkpoint: (?:step (\d+)|none)$", told)
    assert stays is not None
    checkpoints = {
        "block-1.safetensors": "5",
        "manifest.json": "5",
        "config.json": "10",
        "summary.json": "10",
    }
    assert stays[1] == checkpoints.get(name)
    assert "rewinding" not in done.stdout
    assert not (done.out / LEASE).exists()
    assert not list(done.out.rglob(".*.tmp"))


@pytest.mark.slow
def test_a_run_is_resumed_without_the_weights_that_it_began_with(
    tmp_path: Path, brief: Finished, unlabeled: Path, store: str
) -> None:
    weights = Path(shutil.copytree(brief.out / "variants" / "depth04", tmp_path / "weights"))
    done = main_job(tmp_path / "run", unlabeled, store, init_from=str(weights), **SHORT)
    assert done.status == 0, done.stderr
    shutil.rmtree(weights)
    again = call(["--out", str(done.out), "--resume"])
    assert again.status == 0, again.stderr


@contextmanager
def refused_below(out: Path, number: int, refuse: Callable[[str], None]) -> Iterator[Callable[[], int]]:
    """From the `number`-th operation on, `refuse` meets everything that makes or fills a file below `out`.

    Gives the number of operations so far.
    """
    count = 0

    def guarded(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(target: Any, *arguments: Any, **options: Any) -> Any:
            nonlocal count
            path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else os.fsdecode(target)
            if path.startswith(str(out)):
                count += 1
                if count > number:
                    refuse(path)
            return operation(target, *arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("mkdir", "fsync", "replace", "rename"):
            patch.setattr(os, name, guarded(getattr(os, name)))
        yield lambda: count


def no_space(path: str) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="the path of an open file is read from /proc")
@pytest.mark.parametrize("cause", ["full", "renamed"])
def test_a_file_system_that_refuses_at_any_moment_of_the_command_is_a_sentence(
    tmp_path: Path, unlabeled: Path, store: str, cause: str
) -> None:
    out, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    settings = SHORT | {"data__batch_size": "16"}
    rename = os.rename

    def renamed(path: str) -> None:
        if out.exists() and not elsewhere.exists():
            rename(out, elsewhere)

    with refused_below(out, 10**9, no_space) as operations:
        assert main_job(out, unlabeled, store, **settings).status == 0
        total = operations()
    for number in range(1, total, 5):
        for folder in (out, elsewhere):
            shutil.rmtree(folder, ignore_errors=True)
        with refused_below(out, number, no_space if cause == "full" else renamed):
            done = main_job(out, unlabeled, store, **settings)
        if done.status == 0:  # what came after that moment is worth no run: uploads, the log
            assert (elsewhere if cause == "renamed" else out).joinpath("summary.txt").exists(), number
            continue
        (line,) = done.stderr.splitlines()
        assert done.status == 1 or not out.exists(), (number, line)  # 2: the directory cannot be used
        assert line.startswith("error: "), number
        assert "Traceback" not in done.stdout
        assert not list(out.rglob(".*.tmp"))
