"""Whatever lies in the place of a checkpoint is a sentence, never a traceback."""

from __future__ import annotations

import json
import os
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bim.orchestrator.training.checkpoint import CheckpointStore, save_block
from bim.orchestrator.training.manifest import MANIFEST, CheckpointError, FileRecord, Manifest, parse_manifest

MANIFEST_7 = Manifest(
    step=7,
    steps_per_epoch=5,
    settings={"seed": 0, "mask": {"ratio": [0.5, 0.6]}},
    facts={"data": "abc", "precision": "fp32", "bad_images": {"a.png": "truncated"}},
    files=(FileRecord("block-0.safetensors", 12, 34),),
    run_id="0123",
)
AS_JSON: dict[str, Any] = json.loads(json.dumps(asdict(MANIFEST_7)))

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    return [path, *(found for key, child in children for found in paths(child, (*path, key)))]


def replaced(path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copy = deepcopy(AS_JSON)
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return copy


def is_sentence(text: str) -> bool:
    return bool(text.strip()) and len(text.splitlines()) == 1 and len(text) < 200


def test_a_manifest_comes_back() -> None:
    assert parse_manifest(json.dumps(AS_JSON).encode()) == MANIFEST_7
    older = {key: value for key, value in AS_JSON.items() if key != "run_id"}
    assert parse_manifest(json.dumps(older).encode()).run_id == ""


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(paths(AS_JSON)), VALUES)
def test_a_manifest_with_any_value_in_any_place_is_read_or_refused_in_a_sentence(
    path: tuple[Any, ...], value: Any
) -> None:
    problem = ""
    try:
        manifest = parse_manifest(json.dumps(replaced(path, value)).encode())
    except CheckpointError as error:
        problem = str(error)
    else:
        assert isinstance(manifest.facts.get("bad_images", {}) | {}, dict)
        assert manifest.step >= 0
        assert all("/" not in record.name for record in manifest.files)
    assert not problem or is_sentence(problem)


@settings(max_examples=50, deadline=None)
@given(st.binary() | VALUES.map(lambda value: json.dumps(value).encode()))
def test_a_manifest_of_any_content_is_refused_in_a_sentence(content: bytes) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_manifest(content)
    assert is_sentence(str(caught.value))


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"format": 1, "step": ' + b"9" * 5000 + b"}"])
def test_a_manifest_that_exceeds_what_python_reads_is_refused(content: bytes) -> None:
    with pytest.raises(CheckpointError):
        parse_manifest(content)


def committed(out: Path, step: int = 7) -> CheckpointStore:
    store = CheckpointStore(out)
    store.make_root()
    records = save_block(store.directory(step), 0, {"encoder.w": torch.zeros(3)}, {"step": torch.ones(1)})
    store.commit(Manifest(step, 5, {}, {}, tuple(records)))
    return store


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "file").write_text("inside")


def a_link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("nothing")


def a_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def binary(path: Path) -> None:
    path.write_bytes(bytes(range(256)))


@pytest.mark.parametrize("name", [MANIFEST, "block-0.safetensors"])
@pytest.mark.parametrize("spoil", [emptied, a_directory, a_link_to_nothing, a_fifo, a_device, binary])
def test_whatever_lies_in_the_place_of_a_file_is_told_and_the_older_checkpoint_used(
    tmp_path: Path, spoil: Any, name: str
) -> None:
    store = committed(tmp_path, 3)
    committed(tmp_path, 7)
    spoil(store.directory(7) / name)
    latest = store.latest()
    assert latest is not None
    assert latest.step == 3
    (problem,) = store.problems().values()
    assert is_sentence(problem)
    aside = store.set_aside(store.problems())
    assert aside is not None
    assert [path.name for path in aside.iterdir()] == ["step-00000007"]
    assert store.problems() == {}


def test_what_is_no_folder_of_a_checkpoint_is_passed_over(tmp_path: Path) -> None:
    store = committed(tmp_path)
    for name in ("step-", "step-abc", "step-00000009.tmp", "step-" + "9" * 40, "notes"):
        (store.root / name).mkdir()
    (store.root / "step-00000008").write_text("a file")
    latest = store.latest()
    assert latest is not None
    assert latest.step == 7


def test_a_manifest_in_the_folder_of_another_step_is_refused(tmp_path: Path) -> None:
    store = committed(tmp_path)
    store.directory(7).rename(store.directory(9))
    assert store.problems() == {"step-00000009": "its manifest is that of step 7"}


def test_checkpoints_are_ordered_by_number(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        store = committed(tmp_path, step)
    latest = store.latest()
    assert latest is not None
    assert latest.step == 100_000_000


def test_an_output_directory_that_is_gone_is_not_made_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    store = committed(out)
    out.rename(tmp_path / "elsewhere")
    with pytest.raises(
        OSError, match=r"step-00000008 cannot be written \(No such file or directory; was its folder"
    ):
        save_block(store.directory(8), 0, {}, {})
    with pytest.raises(OSError, match="cannot be written"):
        store.commit(Manifest(8, 5, {}, {}, ()))
    assert not out.exists()
    assert store.latest() is None
