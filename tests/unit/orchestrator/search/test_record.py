"""The files of a search: read back as they were written, and of any other content a sentence."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest

from bim.orchestrator.runs.output_dir import OutputError
from bim.orchestrator.search.record import BEST, FOLDER, RECORD, finished_search, load_result, save_result
from tests.unit.orchestrator.search.test_results import result, row


def test_the_record_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    assert load_result(tmp_path) is None
    found = result(row(0, 0.5), row(1, None, status="infeasible"))
    save_result(tmp_path, found)
    assert load_result(tmp_path) == found
    assert not (tmp_path / FOLDER / BEST).exists()
    save_result(tmp_path, found, "# best\n")
    assert (tmp_path / FOLDER / BEST).read_text() == "# best\n"


OLDER = """{"metric": "knn_top1", "images": 100, "epochs": 4, "own": {"mask.ratio": 0.75}, "asked": {"trials": 1},
"fingerprint": "f", "rows": [{"number": 0, "changes": {"mask.ratio": 0.75}, "status": "finished", "why": "trained",
"curve": [{"epoch": 4, "score": 0.5, "by_depth": {"2": 0.5}}], "gflops": 1.0, "images_per_s": 9.0, "tune_id": "a"}],
"finished": true}"""


def test_a_finished_search_of_another_version_is_read_and_an_unfinished_one_refused(
    tmp_path: Path,
) -> None:
    record = tmp_path / FOLDER / RECORD
    record.parent.mkdir()
    record.write_text(OLDER)
    older = load_result(tmp_path)
    assert older is not None
    assert older.baseline_values == {"mask.ratio": 0.75}
    assert older.best.status_reason == "trained"
    record.write_text(OLDER.replace("true", "false"))
    with pytest.raises(
        OutputError,
        match=r"another version and cannot be continued; remove .*/search to search again, or start a new run",
    ):
        load_result(tmp_path)


WHOLE = result(row(0, 0.5), row(1, None, status="infeasible"))


def write(out: Path, content: bytes | str | None = None, **changes: Any) -> None:
    """The record of `WHOLE` with some fields changed, or other content in its place."""
    save_result(out, WHOLE)
    path = out / FOLDER / RECORD
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))


ROW = {
    "number": 0, "changes": {"mask.ratio": 0.75, "schedule.resolution": None}, "status": "running",
    "status_reason": "", "curve": [], "gflops": None, "images_per_s": None,
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": None}, {"rows": [None]}, {"rows": [{}]}, {"metric": "loss"}, {"epochs": None}, {"version": None},
        {"rows": [ROW | {"number": 1}]}, {"rows": [ROW | {"status": "dancing"}]}, {"rows": [ROW | {"changes": {}}]},
        {"rows": [ROW | {"curve": [1]}]}, {"rows": [ROW], "finished": True}, {"fingerprint": None, "rows": 3},
        {"baseline_values": 3}, {"images": math.inf}, {"rows": [ROW | {"number": math.inf}]},
        {"rows": [ROW | {"changes": {"data.source": "/", "out": "/"}}]},
    ],
    ids=str,
)  # fmt: skip
def test_a_record_of_another_form_is_a_sentence_that_names_it(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    write(tmp_path, **changes)
    with pytest.raises(OutputError) as caught:
        load_result(tmp_path)
    assert "to search again" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"null", b"[]", b"3", b"[" * 100_000, pickle.dumps({"rows": []})],
    ids=repr,
)
def test_a_record_that_is_no_record_is_a_sentence_that_names_it(tmp_path: Path, content: bytes) -> None:
    write(tmp_path, content)
    with pytest.raises(
        OutputError, match=r"the record of the search, .*trials\.json, (cannot be read|is damaged)"
    ):
        finished_search(tmp_path)


def test_a_folder_in_place_of_the_record_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / FOLDER / RECORD).mkdir(parents=True)
    with pytest.raises(OutputError, match="cannot be read"):
        load_result(tmp_path)
