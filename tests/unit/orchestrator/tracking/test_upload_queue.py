"""Uploads that wait on the disk for their store."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from bim.orchestrator.tracking import upload_queue
from bim.orchestrator.tracking.upload_queue import UploadQueue


def names(queue: UploadQueue) -> list[str]:
    return [upload.name for upload in queue.waiting()]


def test_another_process_finds_what_was_left_in_its_order(tmp_path: Path) -> None:
    queue = UploadQueue(tmp_path / "uploads")
    for name in ("settings", "provenance", "summary.csv"):
        queue.put(name, "file", {"path": name})
    queue.put("the end", "end", {"status": "KILLED"}, first=True)
    queue.remove(queue.waiting()[1])
    again = UploadQueue(tmp_path / "uploads")
    assert again.waiting() == queue.waiting()
    assert names(again) == ["the end", "provenance", "summary.csv"]
    again.put("later", "file", {"path": "later"})
    assert names(UploadQueue(tmp_path / "uploads")) == ["the end", "provenance", "summary.csv", "later"]


def test_a_newer_upload_of_the_same_name_takes_the_place_of_the_one_that_waits(tmp_path: Path) -> None:
    queue = UploadQueue(tmp_path / "uploads")
    for epoch in range(3):
        queue.put("trial 3", "trial", {"epoch": epoch})
    (upload,) = queue.waiting()
    assert upload.arguments == {"epoch": 2}
    queue.put("trial 3", "trial", {"epoch": 3})  # while the other one is being sent
    queue.remove(upload)
    assert [waiting.arguments for waiting in UploadQueue(tmp_path / "uploads").waiting()] == [{"epoch": 3}]


def test_an_empty_queue_leaves_no_folder(tmp_path: Path) -> None:
    queue = UploadQueue(tmp_path / "uploads")
    assert not (tmp_path / "uploads").exists()
    queue.put("a", "file", {})
    queue.put("b", "file", {})
    queue.discard("a")
    queue.clear()
    assert not (tmp_path / "uploads").exists()


@pytest.mark.parametrize(
    "content", ["", "{", "null", "[]", '{"name": 1}', '{"name": "a", "kind": "b", "arguments": 3}']
)
def test_a_file_that_is_no_upload_is_passed_over(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    UploadQueue(tmp_path).put("good", "file", {})
    (tmp_path / "00000009.json").write_text(content)
    (tmp_path / "notes.json").write_text('{"name": "a", "kind": "b", "arguments": {}, "first": false}')
    assert names(UploadQueue(tmp_path)) == ["good"]
    assert sum("which is not an upload" in message for message in caplog.messages) == 2


def test_a_full_disk_is_one_line_and_the_upload_is_still_sent_by_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)

    def full(path: Path, data: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(upload_queue, "atomic_write", full)
    queue = UploadQueue(tmp_path / "uploads")
    queue.put("a", "file", {})
    queue.put("b", "file", {})
    assert names(queue) == ["a", "b"]
    (line,) = caplog.messages
    assert "No space left on device" in line
