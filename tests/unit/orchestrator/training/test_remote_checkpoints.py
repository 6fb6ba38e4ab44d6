"""Checkpoints below a URL, in fsspec's memory: what counts as committed, what is removed, what is refused."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from hypothesis import given, settings
from hypothesis import strategies as st

from bim.orchestrator.files import StorageError
from bim.orchestrator.training import object_store
from bim.orchestrator.training.checkpoint import (
    CheckpointStore,
    load_block_state,
    load_block_weights,
    save_block,
)
from bim.orchestrator.training.errors import CheckpointDamagedError, StorageUnsupportedError
from bim.orchestrator.training.manifest import FileRecord, Manifest
from bim.orchestrator.training.object_store import ObjectStore
from bim.orchestrator.training.remote_checkpoints import RemoteCheckpointStore, open_remote_folder
from bim.orchestrator.training.storage import check_storage, exists, remove_probe, write_probe

URL = "memory://bucket/runs/first-1a2b"


@pytest.fixture(autouse=True)
def memory() -> Iterator[MemoryFileSystem]:
    """An empty store in memory, whose objects are seen by every store of this process."""
    clear()
    yield fsspec.filesystem("memory")
    clear()


def clear() -> None:
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    open_remote_folder.cache_clear()


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Lets no time pass between requests but on this clock, which is returned: the pauses."""
    pauses: list[float] = []
    monkeypatch.setattr(object_store.time, "sleep", pauses.append)
    monkeypatch.setattr(object_store.time, "monotonic", lambda: sum(pauses))
    return pauses


def write(store: RemoteCheckpointStore, step: int) -> list[FileRecord]:
    weights, state = {"encoder.w": torch.full((3,), float(step))}, {"step/w": torch.tensor(1.0)}
    return save_block(store.directory(step), 0, weights, state)


def commit(store: RemoteCheckpointStore, step: int) -> str:
    return store.commit(Manifest(step, 10, {"seed": 0}, {}, tuple(write(store, step))))


def step_of(store: RemoteCheckpointStore) -> int | None:
    latest = store.latest()
    return None if latest is None else latest.step


def steps(url: str = URL) -> list[int]:
    """Of all folders, committed or not."""
    return sorted({int(path.partition("/")[0].split("-")[1]) for path in ObjectStore(url).sizes()})


def change(url: str, content: bytes) -> None:
    fsspec.filesystem("memory").pipe_file(url, content)


def test_what_was_saved_comes_back_in_another_process() -> None:
    folder = commit(RemoteCheckpointStore(URL), 7)
    store = RemoteCheckpointStore(URL)
    latest = store.latest()
    assert latest is not None
    assert (latest.step, latest.settings) == (7, {"seed": 0})
    assert store.directory(7) == store.committed(7) == folder
    assert torch.equal(load_block_weights(folder, 0)["encoder.w"], torch.full((3,), 7.0))
    assert load_block_state(folder, 0)["step/w"] == 1


def test_without_its_manifest_it_is_no_checkpoint_and_goes_at_the_next_start(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = RemoteCheckpointStore(URL)
    commit(store, 3)
    write(store, 6)
    following = RemoteCheckpointStore(URL)
    assert following.latest(warn=True).step == 3  # type: ignore[union-attr]
    assert following.committed(6) is None
    assert len(caplog.messages) == 1
    assert re.fullmatch(r"checkpoint step-00000006-\w{8} skipped: no manifest \(.*\)", caplog.messages[0])
    following.clear_uncommitted()
    assert steps() == [3]


def test_an_attempt_after_a_rewind_writes_elsewhere_and_its_commit_removes_the_first_one() -> None:
    store = RemoteCheckpointStore(URL)
    commit(store, 3)
    first = store.directory(6)
    write(store, 6)
    store.latest()  # the rewind
    second = commit(store, 6)
    assert first != second
    assert not exists(f"{first}/block-0.safetensors")
    # By a process of the first attempt that still runs.
    save_block(first, 0, {"encoder.w": torch.zeros(3)}, {})
    assert torch.equal(load_block_weights(second, 0)["encoder.w"], torch.full((3,), 6.0))
    assert step_of(RemoteCheckpointStore(URL)) == 6


def test_checkpoints_that_are_being_written_survive_the_commit_of_an_earlier_one() -> None:
    store = RemoteCheckpointStore(URL)
    records = write(store, 3)
    write(store, 6)
    store.commit(Manifest(3, 10, {}, {}, tuple(records)))
    assert steps() == [3, 6]


def test_only_the_newest_are_kept_and_other_runs_are_left_alone() -> None:
    others = RemoteCheckpointStore(f"{URL}5"), RemoteCheckpointStore(f"{URL}/search/trial-0")
    for other in others:
        commit(other, 1)
    store = RemoteCheckpointStore(URL, keep=2)
    for step in (1, 2, 3, 4):
        commit(store, step)
    assert [step for step in (1, 2, 3, 4) if store.committed(step)] == [3, 4]
    assert [step_of(other) for other in others] == [1, 1]


def test_an_older_one_stays_where_it_is_asked_for() -> None:
    store = RemoteCheckpointStore(URL, keep=1, is_kept=lambda step: step == 2)
    for step in (1, 2, 3, 4):
        commit(store, step)
    assert [step for step in (1, 2, 3, 4) if store.committed(step)] == [2, 4]


def test_sizes_are_compared_without_a_download(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = RemoteCheckpointStore(URL, keep=3)
    folders = [commit(store, step) for step in (1, 2, 3)]
    change(f"{folders[2]}/block-0.safetensors", b"torn")
    change(f"{folders[1]}/manifest.json", b'{"step": 2, "for')
    read: list[str] = []
    cat_file = MemoryFileSystem.cat_file
    monkeypatch.setattr(
        MemoryFileSystem, "cat_file", lambda self, path, **_: read.append(path) or cat_file(self, path)
    )
    assert step_of(store) == 1
    assert {path.rpartition("/")[2] for path in read} == {"manifest.json"}
    store.latest(warn=True)
    assert "block-0.safetensors has 4 of" in caplog.messages[0]
    assert "unreadable manifest" in caplog.messages[1]
    assert list(store.problems()) == [folder.rpartition("/")[2] for folder in folders[:0:-1]]


def test_the_reader_of_a_file_finds_a_wrong_checksum_and_every_later_process_skips_it() -> None:
    store = RemoteCheckpointStore(URL)
    commit(store, 1)
    folder = commit(store, 2)
    path = f"{folder}/block-0.safetensors"
    content = bytearray(fsspec.filesystem("memory").cat_file(path))
    content[-1] ^= 1
    change(path, bytes(content))
    with pytest.raises(CheckpointDamagedError, match=r"block-0.safetensors has a wrong checksum") as error:
        load_block_weights(folder, 0)
    store.reject(error.value)
    assert step_of(store) == 1
    assert step_of(RemoteCheckpointStore(URL)) == 1


def test_a_commit_after_a_damaged_checkpoint_moves_it_aside(caplog: pytest.LogCaptureFixture) -> None:
    store = RemoteCheckpointStore(URL)
    commit(store, 1)
    folder = commit(store, 5)
    change(f"{folder}/block-0.safetensors", b"torn")
    store.latest()
    commit(store, 3)
    assert step_of(RemoteCheckpointStore(URL)) == 3
    assert "moved to memory://bucket/runs/first-1a2b/unreadable-" in caplog.messages[-1]
    aside = caplog.messages[-1].partition("moved to ")[2]
    assert exists(f"{aside}/{folder.rpartition('/')[2]}/block-0.safetensors")


def test_two_processes_with_one_url_are_noticed() -> None:
    one, other = RemoteCheckpointStore(URL), RemoteCheckpointStore(URL)
    assert one.latest() is other.latest() is None
    commit(one, 9)
    with pytest.raises(StorageError, match="has a checkpoint of step 9, which this process did not write"):
        commit(other, 5)
    assert step_of(one) == 9


def test_a_checkpoint_of_another_run_is_not_used() -> None:
    commit(RemoteCheckpointStore(URL), 5)
    store = RemoteCheckpointStore(URL, objection=lambda manifest: f"seed {manifest.settings['seed']}")
    assert store.latest() is None
    assert list(store.problems().values()) == ["seed 0"]
    assert store.set_aside(store.problems()).startswith(f"{URL}/unreadable-")  # type: ignore[union-attr]
    assert store.problems() == {}


class ProcessDied(BaseException):
    """Raised in place of a request, as if the process were killed before it."""


@settings(max_examples=40, deadline=None)
@given(
    at=st.lists(st.integers(1, 9), min_size=1, max_size=4, unique=True).map(sorted),
    keep=st.integers(1, 3),
    requests=st.integers(0, 30),
)
def test_a_death_at_any_request_leaves_the_previous_checkpoint_or_the_new_one(
    at: list[int], keep: int, requests: int
) -> None:
    clear()
    left = requests

    def dying(request: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise ProcessDied
            return request(*arguments, **options)

        return call

    committed = None
    store = RemoteCheckpointStore(URL, keep=keep)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("pipe_file", "rm", "find", "cat_file"):
            patch.setattr(MemoryFileSystem, name, dying(getattr(MemoryFileSystem, name)))
        attempted = None
        try:
            for step in at:
                attempted = step
                commit(store, step)
                committed = step
        except ProcessDied:
            pass
    following = RemoteCheckpointStore(URL, keep=keep)
    following.clear_uncommitted()
    latest = following.latest()
    assert (None if latest is None else latest.step) in {committed, attempted if left < 0 else committed}
    if latest is not None:
        weights = load_block_weights(following.directory(latest.step), 0)["encoder.w"]
        assert torch.equal(weights, torch.full((3,), float(latest.step)))


# -- requests -----------------------------------------------------------------------------------------------------


class Failing:
    """A request of fsspec that fails some times before it works."""

    def __init__(self, patch: pytest.MonkeyPatch, name: str, times: int, error: Exception) -> None:
        self.left, self.calls = times, 0
        request = getattr(MemoryFileSystem, name)

        def call(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            self.left -= 1
            if self.left >= 0:
                raise error
            return request(*arguments, **options)

        patch.setattr(MemoryFileSystem, name, call)


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize("error", [ConnectionError("reset"), TimeoutError(), OSError(5, "Slow down")])
def test_a_request_is_repeated_until_the_storage_is_back(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = Failing(monkeypatch, "pipe_file", 4, error)
    commit(RemoteCheckpointStore(URL), 3)
    assert failing.calls == 4 + 3  # two files, the manifest
    assert step_of(RemoteCheckpointStore(URL)) == 3


def test_pauses_grow_and_end_with_a_sentence(no_pauses: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    Failing(monkeypatch, "pipe_file", 1000, ConnectionError("reset by peer"))
    with pytest.raises(StorageError) as error:
        ObjectStore(URL, retry_for_s=60).write("x", b"")
    assert str(error.value) == f"{URL} cannot be written to (ConnectionError: reset by peer)"
    assert no_pauses[:6] == [0.5, 1, 2, 4, 8, 16]
    assert sum(no_pauses) == 60


@pytest.mark.parametrize("error", [PermissionError("Access Denied"), FileNotFoundError("no such bucket")])
def test_what_time_does_not_heal_is_said_at_once(
    error: Exception, no_pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    Failing(monkeypatch, "pipe_file", 1000, error)
    with pytest.raises(StorageError, match=rf"cannot be written to \({type(error).__name__}: {error}\)"):
        check_storage(URL)
    assert no_pauses == []


def test_a_checkpoint_that_is_committed_stays_when_the_storage_goes_before_the_old_ones_are_removed(
    no_pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RemoteCheckpointStore(URL, keep=1)
    commit(store, 1)
    Failing(monkeypatch, "rm", 1000, ConnectionError())
    commit(store, 2)
    assert step_of(RemoteCheckpointStore(URL)) == 2


def test_neither_passwords_nor_signatures_get_into_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "cannot reach https://key:hunter2@minio:9000/bucket?X-Amz-Signature=abc of 'x'"
    Failing(monkeypatch, "pipe_file", 1, PermissionError(secret))
    with pytest.raises(StorageError) as error:
        check_storage(URL)
    assert "https://***@minio:9000/bucket?X-Amz-Signature=*** of 'x'" in str(error.value)
    assert "hunter2" not in str(error.value)
    assert "abc" not in str(error.value)


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in ("s3fs", "gcsfs")]:
        monkeypatch.delitem(sys.modules, name)
    for protocol, package, command in (
        ("s3", "s3fs", "pip install '.[s3]'"),
        ("gs", "gcsfs", "pip install gcsfs"),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.delitem(_registry, protocol, raising=False)
        with pytest.raises(StorageUnsupportedError) as error:
            ObjectStore(f"{protocol}://bucket/x")
        assert str(error.value) == f"{protocol}:// needs the package {package}: {command}"


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(StorageUnsupportedError, match="s4:// is no storage that fsspec knows"):
        ObjectStore("s4://bucket/x")


def test_a_folder_by_its_url_serves_too(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/runs/first"
    check_storage(url)
    commit(RemoteCheckpointStore(url), 5)
    commit(RemoteCheckpointStore(url, keep=1), 6)
    assert step_of(RemoteCheckpointStore(url)) == 6
    assert steps(url) == [6]


def test_a_probe_is_seen_until_it_is_removed(tmp_path: Path) -> None:
    for location in (URL, tmp_path):
        probe = write_probe(location)
        assert exists(probe)
        remove_probe(probe)
        assert not exists(probe)


def test_folders_on_a_disk_never_import_fsspec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fsspec", "fsspec.core", "fsspec.registry"):
        monkeypatch.setitem(sys.modules, name, None)
    store = CheckpointStore(tmp_path)
    store.make_root()
    store.clear_uncommitted()
    records = save_block(store.directory(2), 0, {"encoder.w": torch.zeros(3)}, {})
    store.commit(Manifest(2, 10, {}, {}, tuple(records)))
    assert store.latest() is not None
    assert load_block_weights(store.directory(2), 0).keys() == {"encoder.w"}
    with pytest.raises(ImportError):
        RemoteCheckpointStore(URL)
