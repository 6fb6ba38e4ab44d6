from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bim.orchestrator.training.checkpoint import (
    CheckpointStore,
    load_block_state,
    load_block_weights,
    load_weights,
    save_block,
)
from bim.orchestrator.training.manifest import Manifest
from bim.orchestrator.training.spec import DecoderSpec, PretrainSpec


def commit(store: CheckpointStore, step: int) -> None:
    store.make_root()
    records = save_block(
        store.directory(step), 0, {"encoder.w": torch.full((3,), float(step))}, {"step/w": torch.tensor(1.0)}
    )
    store.commit(Manifest(step, 10, {"seed": 0}, {}, tuple(records)))


def step_of(store: CheckpointStore) -> int | None:
    latest = store.latest()
    return None if latest is None else latest.step


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    commit(store, 7)
    latest = store.latest()
    assert latest is not None
    assert (latest.step, latest.settings) == (7, {"seed": 0})
    assert torch.equal(load_block_weights(store.directory(7), 0)["encoder.w"], torch.full((3,), 7.0))
    assert load_block_state(store.directory(7), 0)["step/w"] == 1


def test_weights_of_all_blocks_are_loaded_in_the_order_of_the_spec(tmp_path: Path) -> None:
    for index in (1, 0):
        save_block(tmp_path, index, {"encoder.w": torch.tensor([float(index)])}, {})
    spec = PretrainSpec("vit_tiny_patch16_224", {}, (6, 6), (0.75,) * 2, (DecoderSpec(1, 32),) * 2)
    assert [weights["encoder.w"].item() for weights in load_weights(tmp_path, spec)] == [0.0, 1.0]


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2, 3, 4):
        commit(store, step)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000003", "step-00000004"]


def test_an_older_one_stays_where_it_is_asked_for(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1, is_kept=lambda step: step == 2)
    for step in (1, 2, 3, 4):
        commit(store, step)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    assert step_of(store) == 4


def test_files_without_a_manifest_are_no_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore(tmp_path)
    commit(store, 3)
    save_block(store.directory(6), 0, {"encoder.w": torch.zeros(3)}, {})
    assert step_of(store) == 3
    assert not caplog.messages
    store.latest(warn=True)
    assert caplog.messages == ["checkpoint step-00000006 skipped: no manifest (incomplete write)"]
    store.clear_uncommitted()
    assert not store.directory(6).exists()


def test_changed_bytes_and_incomplete_manifests_are_noticed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    for step in (1, 2, 3):
        commit(store, step)
    weights = store.directory(3) / "block-0.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    (store.directory(2) / "manifest.json").write_text('{"step": 2, "for')
    latest = store.latest(warn=True)
    assert latest is not None
    assert latest.step == 1
    assert "block-0.safetensors has a wrong checksum" in caplog.messages[0]
    assert "unreadable manifest" in caplog.messages[1]


def test_a_commit_after_a_rewind_sets_the_damaged_checkpoints_beyond_it_aside(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    for step in (1, 5):
        commit(store, step)
    (store.directory(5) / "block-0.safetensors").write_bytes(b"torn")
    commit(store, 3)
    assert step_of(store) == 3
    assert not store.directory(5).exists()
    (aside,) = tmp_path.glob("checkpoints.unreadable-*")
    assert (aside / "step-00000005" / "block-0.safetensors").read_bytes() == b"torn"


def test_a_commit_removes_the_temporary_files_of_a_killed_stage(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.make_root()
    store.directory(2).mkdir()
    (store.directory(2) / ".block-0.safetensors.77.tmp").write_bytes(b"half")
    commit(store, 2)
    assert not list(store.directory(2).glob(".*"))


class ProcessDied(BaseException):
    """Raised in place of a file operation, as if the process were killed before it."""


@contextmanager
def dying_after(operations: int) -> Iterator[None]:
    """Let that many file operations happen and raise `ProcessDied` in place of every later one.

    Death at a flush to the disk leaves half of the file.
    """
    left = operations

    def dying(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                if operation is fsync:
                    os.ftruncate(arguments[0], os.fstat(arguments[0]).st_size // 2)
                raise ProcessDied
            return operation(*arguments, **options)

        return call

    fsync = os.fsync
    with pytest.MonkeyPatch.context() as patch:
        for name in ("mkdir", "fsync", "replace", "unlink", "rmdir"):
            patch.setattr(os, name, dying(getattr(os, name)))
        yield


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.integers(1, 9), min_size=1, max_size=4, unique=True).map(sorted),
    keep=st.integers(1, 3),
    operations=st.integers(0, 60),
)
def test_a_death_at_any_file_operation_leaves_the_previous_checkpoint_or_the_new_one(
    steps: list[int], keep: int, operations: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store, committed, current = CheckpointStore(Path(folder), keep), None, None
        try:
            with dying_after(operations):
                for current in steps:
                    commit(store, current)
                    committed = current
        except ProcessDied:
            assert step_of(store) in (committed, current)
        else:
            assert step_of(store) == committed == steps[-1]
        latest = step_of(store)
        if latest is not None:
            assert load_block_weights(store.directory(latest), 0)["encoder.w"][0] == latest
        restarted = CheckpointStore(Path(folder), keep)
        restarted.clear_uncommitted()
        assert step_of(restarted) == latest
        commit(restarted, 10)
        assert step_of(restarted) == 10
