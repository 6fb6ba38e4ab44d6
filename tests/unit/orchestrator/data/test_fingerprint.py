"""The fingerprint of an open source is computed once; a copy in another process computes its own."""

from __future__ import annotations

import gc
import os
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bim.orchestrator.data.dataset_source import DatasetSource
from bim.orchestrator.data.fingerprint import computed_once
from bim.orchestrator.data.folder import FolderSource
from bim.orchestrator.data.source import open_source


class Counted:
    """Counts how often it is computed, in the process."""

    computed = 0

    @computed_once
    def fingerprint(self) -> str:
        type(self).computed += 1
        return f"{type(self).computed}"


class ReadItems:
    """Images that count how often they are read."""

    def __init__(self) -> None:
        self.reads = 0

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> np.ndarray:
        self.reads += 1
        return np.full((4, 4, 3), index, dtype=np.uint8)


def test_it_is_computed_once_for_each_object_and_anew_for_a_copy() -> None:
    one, other = Counted(), Counted()
    assert [one.fingerprint(), one.fingerprint(), other.fingerprint()] == ["1", "1", "2"]
    assert pickle.loads(pickle.dumps(one)).fingerprint() == "3"
    assert one.fingerprint() == "1"
    gone = weakref.ref(one)
    del one
    gc.collect()
    assert gone() is None


def test_files_are_looked_at_once(image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    root = image_folder("a.png", "b.png")
    source, looked_at = FolderSource(root), list[str]()

    def stat(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        looked_at.append(os.fspath(path))
        return true_stat(path, *args, **kwargs)

    true_stat = os.stat
    monkeypatch.setattr("bim.orchestrator.data.folder.os.stat", stat)
    first = source.fingerprint()
    names = [Path(path).name for path in looked_at if path.endswith(".png")]
    assert names == ["a.png", "b.png"]
    assert source.fingerprint() == first
    assert len([path for path in looked_at if path.endswith(".png")]) == 2


def test_items_are_read_once() -> None:
    items = ReadItems()
    source = DatasetSource("items", items)
    first = source.fingerprint()
    reads = items.reads
    assert source.fingerprint() == first
    assert items.reads == reads


def test_files_that_change_are_noticed_by_whoever_opens_them_again(image_folder: Callable[..., Path]) -> None:
    root = image_folder("a.png", "b.png")
    source = open_source(str(root))
    first, copy = source.fingerprint(), pickle.dumps(source)
    (root / "b.png").write_bytes(b"shorter")
    assert open_source(str(root)).fingerprint() != first
    assert pickle.loads(copy).fingerprint() != first
