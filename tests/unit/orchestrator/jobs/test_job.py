"""What the system refuses in any part of a job is a sentence, before it and in it."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bim.orchestrator.config.cli import load_settings
from bim.orchestrator.files import StorageError
from bim.orchestrator.jobs import job as job_module
from bim.orchestrator.jobs import prepare as prepare_module
from bim.orchestrator.jobs.backbone_run import BackboneRun
from bim.orchestrator.jobs.job import run_job
from bim.orchestrator.jobs.prepare import PreparedJob, prepare
from bim.orchestrator.runs.provenance import collect
from bim.orchestrator.runs.run_identity import OutputError
from bim.orchestrator.training.callbacks import StopRequest
from bim.orchestrator.training.errors import TrainingError


def refusing(error: OSError) -> Any:
    def refuse(*arguments: object) -> None:
        raise error

    return refuse


def job_in(out: Path) -> PreparedJob:
    return cast(PreparedJob, SimpleNamespace(out=out))


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EIO, errno.ESTALE, errno.EACCES])
def test_what_the_system_refuses_in_the_output_directory_ends_the_run_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path = str(tmp_path / "run" / "search" / ".tune-x")
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(job_module, "_run", refusing(OSError(number, os.strerror(number), path)))
    with pytest.raises(TrainingError, match=rf"{path}: {os.strerror(number)}; .*last checkpoint: none"):
        run_job(job_in(tmp_path / "run"))


def test_a_full_disk_anywhere_ends_the_run_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        job_module, "_run", refusing(OSError(errno.ENOSPC, "No space left on device", "/tmp/x"))
    )
    with pytest.raises(TrainingError, match="/tmp/x: No space left on device"):
        run_job(job_in(tmp_path))


def test_an_error_of_the_program_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_module, "_run", refusing(FileNotFoundError(errno.ENOENT, "gone", "/usr/lib/x")))
    with pytest.raises(FileNotFoundError):
        run_job(job_in(tmp_path))


def test_a_directory_that_the_system_does_not_let_one_look_at_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stat(path: Path, **options: object) -> os.stat_result:
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    settings = load_settings(["--out", str(tmp_path / "run"), "--search.trials", "0"])
    monkeypatch.setattr(
        prepare_module, "resolve_backbone", lambda *a: SimpleNamespace(run=SimpleNamespace(fingerprint=""))
    )
    monkeypatch.setattr(Path, "stat", stat)
    with pytest.raises(OutputError, match=r"cannot be used: .*/run: Stale file handle"):
        prepare(settings)


def test_the_last_checkpoint_of_a_directory_that_is_gone_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    monkeypatch.setattr(job_module, "_run", refusing(StorageError(errno.ENOENT, "cannot be read", str(out))))
    with pytest.raises(TrainingError, match="last checkpoint: unknown"):
        run_job(job_in(out))


def test_where_nothing_can_be_read_any_more_the_first_refusal_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "storage.json").mkdir()
    path = str(tmp_path / "summary.txt")
    monkeypatch.setattr(job_module, "_run", refusing(StorageError(errno.EIO, "cannot be written (x)", path)))
    with pytest.raises(
        TrainingError, match=r"summary.txt cannot be written \(x\); .*last checkpoint: unknown"
    ):
        run_job(job_in(tmp_path))


def test_the_depths_begin_in_mlflow_before_the_estimate_the_search_and_the_wait_for_resources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    class Recorder:
        def begin_depths(self, params: dict[int, dict[str, object]], series: str) -> None:
            events.append(f"depths {sorted(params)}{series}")

        def ui_pages(self) -> None: ...

        def request_end(self, status: str) -> None:
            events.append(status)

        def finish(self, status: str) -> None: ...

    out = ["--out", str(tmp_path / "run"), "--placement.backend", "in_process", "--search.trials", "0"]
    job, stop = prepare(load_settings(out)), StopRequest()
    (prepared,) = job.backbones
    tracker: Any = Recorder()
    backbone = BackboneRun(prepared, [], "fp32", collect(), tracker)

    def train(*arguments: object) -> None:
        events.append("training")
        stop.reason = "SIGTERM"

    monkeypatch.setattr(job_module, "_open", lambda *a: ([backbone], None))
    monkeypatch.setattr(job_module, "_log_opening", lambda *a: None)
    monkeypatch.setattr(job_module, "following_lines", lambda *a: [])
    monkeypatch.setattr(job_module, "log_estimate", lambda *a: events.append("estimate"))
    monkeypatch.setattr(job_module, "describe_beginning", lambda *a: None)
    monkeypatch.setattr(job_module, "_search", lambda *a: events.append("search"))
    monkeypatch.setattr(job_module, "train_backbones", train)
    assert run_job(job, stop).stopped == "SIGTERM"
    depths = sorted(prepared.run.depths)
    assert events == [f"depths {depths}", "estimate", "search", "training", "KILLED"]
