"""Files of an evaluation on another node: whole or not at all in the output directory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bim.orchestrator.evaluation.progress import part, report
from bim.orchestrator.evaluation.records import EvaluationResult
from bim.orchestrator.jobs import remote_evaluation
from bim.orchestrator.jobs.remote_evaluation import SentFile, evaluate_and_send, receive

RESULT = EvaluationResult((), (), {}, {3: "variants/depth03"}, {3: "pictures/depth03.png"})


def sent(path: str, text: str) -> SentFile:
    return SentFile(path, np.frombuffer(text.encode(), np.uint8))


def items(weights: str) -> Iterator[SentFile | EvaluationResult]:
    yield sent("decoders/block-0.safetensors", "decoder")
    yield sent("pictures/depth03.png", "picture")
    yield sent("variants/depth03/config.json", '{"exported_by": "bim-orchestrator"}')
    yield sent(f"variants/depth03/{weights}", "weights")
    yield RESULT


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_files_arrive_where_the_evaluation_here_would_put_them_and_replace_older_ones(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "loss.png").write_text("of the training")
    receive(items("old.safetensors"), tmp_path, print)
    result = receive(items("model.safetensors"), tmp_path, print)
    assert result is not None
    assert result.folders == {3: str(tmp_path / "variants/depth03")}
    assert result.pictures == {3: str(tmp_path / "pictures/depth03.png")}
    assert files(tmp_path) == [
        "decoders/block-0.safetensors",
        "pictures/depth03.png",
        "pictures/loss.png",
        "variants/depth03/config.json",
        "variants/depth03/model.safetensors",
    ]
    assert not list(tmp_path.glob(".*"))


def test_an_evaluation_that_is_canceled_leaves_nothing(tmp_path: Path) -> None:
    assert receive(list(items("model.safetensors"))[:-1], tmp_path, print) is None
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_somebody_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "variants" / "depth03").mkdir(parents=True)
    (tmp_path / "variants" / "depth03" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is not an exported model of this project"):
        receive(items("model.safetensors"), tmp_path, print)
    assert files(tmp_path) == ["variants/depth03/thesis.txt"]


def test_what_an_evaluation_writes_is_sent_and_its_folder_is_gone_afterward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders, told, told_in_time = [], list[str](), threading.Event()

    def tell(text: str) -> None:
        told.append(text)
        told_in_time.set()

    def evaluate(task: Any) -> EvaluationResult:
        folders.append(Path(task.out))
        with part("trained models"):
            report("12 of 50 images")
            told_in_time.wait(10)
        for name in ("variants/depth03/config.json", "pictures/depth03.png"):
            path = Path(task.out) / name
            path.parent.mkdir(parents=True)
            path.write_text('{"exported_by": "bim-orchestrator"}')
        return EvaluationResult(
            (), (), {}, {3: f"{task.out}/variants/depth03"}, {3: f"{task.out}/pictures/depth03.png"}
        )

    monkeypatch.setattr(remote_evaluation, "evaluate_checkpoint", evaluate)
    monkeypatch.setattr(remote_evaluation, "replace", lambda record, **changes: _replace(record, changes))
    monkeypatch.setattr(remote_evaluation, "PROGRESS_INTERVAL_S", 0.01)
    task: Any = SimpleNamespace(out="/head/runs/first")
    result = receive(evaluate_and_send(task), tmp_path, tell)
    assert told == ["trained models: 12 of 50 images"]
    assert result is not None
    assert result.folders == {3: str(tmp_path / "variants/depth03")}
    assert files(tmp_path) == ["pictures/depth03.png", "variants/depth03/config.json"]
    assert not folders[0].exists()


def _replace(record: Any, changes: dict[str, Any]) -> Any:
    if isinstance(record, SimpleNamespace):
        return SimpleNamespace(**{**vars(record), **changes})
    return EvaluationResult(**{**{name: getattr(record, name) for name in vars(RESULT)}, **changes})
