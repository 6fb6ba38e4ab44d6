from __future__ import annotations

from pathlib import Path

import torch

from bim.orchestrator.training.checkpoint import (
    CheckpointStore,
    Manifest,
    all_files,
    load_block_state,
    load_block_weights,
    save_block,
)


def commit(store: CheckpointStore, step: int) -> None:
    records = save_block(
        store.directory(step), 0, {"encoder.w": torch.full((3,), float(step))}, {"step/w": torch.tensor(1.0)}
    )
    store.commit(Manifest(step, 10, {"seed": 0}, {}, all_files([records])))


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    commit(store, 7)
    found = store.latest()
    assert found is not None
    assert (found.step, found.settings) == (7, {"seed": 0})
    assert torch.equal(load_block_weights(store.directory(7), 0)["encoder.w"], torch.full((3,), 7.0))
    assert load_block_state(store.directory(7), 0)["step/w"] == 1


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2, 3, 4):
        commit(store, step)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000003", "step-00000004"]


def test_files_without_a_manifest_are_no_checkpoint(tmp_path: Path) -> None:
    said: list[str] = []
    store = CheckpointStore(tmp_path, say=said.append)
    commit(store, 3)
    save_block(store.directory(6), 0, {"encoder.w": torch.zeros(3)}, {})
    found = store.latest()
    assert found is not None
    assert found.step == 3
    assert said == ["checkpoint step-00000006 is passed over: it was never committed"]
    store.clear_uncommitted()
    assert not store.directory(6).exists()


def test_changed_bytes_and_torn_manifests_are_noticed(tmp_path: Path) -> None:
    said: list[str] = []
    store = CheckpointStore(tmp_path, keep=3, say=said.append)
    for step in (1, 2, 3):
        commit(store, step)
    weights = store.directory(3) / "block-0.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    (store.directory(2) / "manifest.json").write_text('{"step": 2, "for')
    found = store.latest()
    assert found is not None
    assert found.step == 1
    assert "does not have the bytes that were written" in said[0]
    assert "manifest cannot be read" in said[1]


def test_after_a_rewind_past_damaged_checkpoints_the_new_one_stays_and_they_go(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1, say=lambda _: None)
    for step in (1, 5):
        commit(store, step)
    (store.directory(5) / "block-0.safetensors").write_bytes(b"torn")
    commit(store, 3)
    found = store.latest()
    assert found is not None
    assert found.step == 3
    assert not store.directory(5).exists()


def test_what_a_killed_stage_left_half_written_is_swept_by_the_commit(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.directory(2).mkdir(parents=True)
    (store.directory(2) / ".block-0.safetensors.77.tmp").write_bytes(b"half")
    commit(store, 2)
    assert not list(store.directory(2).glob(".*"))
