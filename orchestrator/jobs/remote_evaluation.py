"""The evaluation of a checkpoint on a node that does not see the output directory: its files are sent to the driver."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from bim.orchestrator.evaluation.progress import reported_to
from bim.orchestrator.evaluation.records import EvaluationResult
from bim.orchestrator.export.timm_folder import check_replaceable
from bim.orchestrator.files import atomic_write, make_folder, storage_errors, temporary_folder
from bim.orchestrator.jobs.evaluate_checkpoint import evaluate_checkpoint
from bim.orchestrator.jobs.evaluation_task import EvaluationTask

PROGRESS_INTERVAL_S = 2.0
"""Seconds between two looks at the progress."""


@dataclass(frozen=True)
class SentFile:
    """A file of an evaluation.

    Args:
        path: relative to the output directory.
        content: (bytes,) uint8; Ray hands arrays over without a copy.
    """

    path: str
    content: np.ndarray


def evaluate_and_send(task: EvaluationTask) -> Iterator[str | SentFile | EvaluationResult]:
    """Evaluate into a folder of this machine.

    Yields a few words of progress now and then, the files, then the result with paths relative to that folder.
    """
    with temporary_folder("bim-evaluation-") as parent, ThreadPoolExecutor(1) as executor:
        folder = parent / "out"
        folder.mkdir()
        progress: deque[str] = deque(maxlen=1)
        evaluation = executor.submit(_evaluate, replace(task, out=str(folder)), progress)
        while not wait([evaluation], timeout=PROGRESS_INTERVAL_S).done:
            with suppress(IndexError):
                yield progress.pop()
        result = evaluation.result()
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                yield SentFile(str(path.relative_to(folder)), np.fromfile(path, np.uint8))
        yield replace(
            result,
            folders={depth: str(Path(path).relative_to(folder)) for depth, path in result.folders.items()},
            pictures={depth: str(Path(path).relative_to(folder)) for depth, path in result.pictures.items()},
        )


def _evaluate(task: EvaluationTask, progress: deque[str]) -> EvaluationResult:
    with reported_to(progress.append):
        return evaluate_checkpoint(task)


def receive(
    items: Iterable[str | SentFile | EvaluationResult], out: Path, on_progress: Callable[[str], None]
) -> EvaluationResult | None:
    """Put the files of an evaluation into the output directory, once all are here. None if they end before the result.

    on_progress: called with words of progress.

    Raises:
        StorageError: the file system refuses.
    """
    with storage_errors(out), TemporaryDirectory(prefix=".evaluation-", suffix=".tmp", dir=out) as folder:
        incoming, replaced = Path(folder) / "new", Path(folder) / "old"
        for item in items:
            if isinstance(item, str):
                on_progress(item)
                continue
            if isinstance(item, EvaluationResult):
                _move_into(incoming, replaced, out)
                return replace(
                    item,
                    folders={depth: str(out / path) for depth, path in item.folders.items()},
                    pictures={depth: str(out / path) for depth, path in item.pictures.items()},
                )
            path = incoming / item.path
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, item.content.tobytes())
    return None


def _move_into(incoming: Path, replaced: Path, out: Path) -> None:
    """Move timm folders as a whole, and every other file. What an earlier evaluation left there is replaced."""
    for fresh in sorted(incoming.glob("variants/*")):
        target = out / fresh.relative_to(incoming)
        check_replaceable(target)
        make_folder(target.parent)
        if target.exists():
            replaced.mkdir(exist_ok=True)
            target.rename(replaced / fresh.name)
        fresh.rename(target)
    for fresh in sorted(path for path in incoming.rglob("*") if path.is_file()):
        target = out / fresh.relative_to(incoming)
        make_folder(target.parent)
        fresh.replace(target)
