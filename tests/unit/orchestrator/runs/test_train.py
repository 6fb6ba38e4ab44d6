"""The training of a run whose file system refuses: full, read-only, renamed; at every write in turn."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bim.orchestrator.config.cli import load_settings
from bim.orchestrator.config.transforms import with_changes
from bim.orchestrator.distributed.placement import StageLayout
from bim.orchestrator.files import StorageError, atomic_write
from bim.orchestrator.runs import train as module
from bim.orchestrator.runs.lease import LEASE
from bim.orchestrator.runs.output_dir import claim, open_store
from bim.orchestrator.runs.prepare import ResolvedRun, resolve_run
from bim.orchestrator.runs.run_identity import OutputError, new_identity, read_identity, write_identity
from bim.orchestrator.runs.train import train
from bim.orchestrator.training.callbacks import NullCallback, PretrainResult, StopRequest
from bim.orchestrator.training.checkpoint import load_block_weights, save_block
from bim.orchestrator.training.errors import StageFailure, TrainingError
from bim.orchestrator.training.messages import SavedBlocks, StageReport, StepReport, StepRequest
from bim.orchestrator.training.stage_group import ShouldGiveUp
from tests.unit.orchestrator.training.stub_stages import StubStages

SETTINGS = """--placement.backend in_process --search.trials 0 --blocks 2 --data.workers 0 --data.batch_size 256
--backbone.model_args {img_size:\\ 16,patch_size:\\ 4,embed_dim:\\ 32,depth:\\ 2,num_heads:\\ 2} --decoder.dim 32
--decoder.num_heads 1 --schedule.epochs 2 --schedule.warmup_epochs 0 --checkpoint.every_epochs 1
--checkpoint.keep 1 --evaluation.latency false"""

LAYOUT = StageLayout(((0,), (1,)), gpus=0.0, cpus=1.0, loader_cpus=0.0, threads=1)


class FileStages(StubStages):
    """Two stages of which only the checkpoints are real; their weights are the number of updates."""

    def __init__(self) -> None:
        self.updates, self.restores = 0, 0

    def restore(self, checkpoint: Path | None, step: int, should_give_up: ShouldGiveUp) -> None:
        self.restores += 1
        self.updates = 0 if checkpoint is None else int(load_block_weights(checkpoint, 0)["encoder.w"])

    def submit(self, request: StepRequest) -> Any:
        try:
            self.updates += 1
            saved = ((), ()) if request.checkpoint is None else self.write(request.checkpoint)
        except Exception as error:
            error = pickle.loads(pickle.dumps(error))  # it comes from another process
            return StageFailure("stage 1 (block 1)", f"at step {request.step}", error, process_lost=False)
        reports = tuple(StageReport({k: {"loss": 1.0}}, saved[k], 0.01, 0.0) for k in (0, 1))
        return StepReport(request, reports, (), 0.0, 0.0)

    def write(self, checkpoint: str) -> tuple[tuple[SavedBlocks, ...], ...]:
        weights = {"encoder.w": torch.tensor(float(self.updates))}
        return tuple(
            (SavedBlocks(checkpoint, tuple(save_block(Path(checkpoint), k, weights, weights))),)
            for k in (0, 1)
        )

    def flush(self, should_give_up: ShouldGiveUp) -> tuple[tuple[SavedBlocks, ...], ...]:
        return ((), ())


@pytest.fixture(scope="module")
def resolved(tmp_path_factory: pytest.TempPathFactory) -> ResolvedRun:
    return resolve_run(load_settings(shlex.split(SETTINGS)), tmp_path_factory.mktemp("nowhere"))[0]


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> FileStages:
    stages = FileStages()
    monkeypatch.setattr(module, "make_stages", lambda *arguments: stages)
    return stages


def in_folder(run: ResolvedRun, out: Path) -> ResolvedRun:
    out.mkdir(exist_ok=True)
    record = read_identity(out) or new_identity(run.fingerprint)
    write_identity(out, record)
    return replace(run, out=out, record=record)


def trained(run: ResolvedRun, callback: NullCallback | None = None, **options: Any) -> PretrainResult:
    return train(run, LAYOUT, "fp32", callback or NullCallback(), StopRequest(), **options)


def checkpoint_step(run: ResolvedRun) -> int:
    latest = open_store(run.out).latest()
    return 0 if latest is None else latest.step


@contextmanager
def failing(number: int, code: int = errno.ENOSPC) -> Iterator[Callable[[], int]]:
    """From the `number`-th operation on, everything that makes or fills a file is refused; gives the number so far."""
    count = 0

    def refusing(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count > number:
                if operation is fsync:  # what was written so far is half of it
                    os.ftruncate(arguments[0], os.fstat(arguments[0]).st_size // 2)
                raise OSError(code, os.strerror(code))
            return operation(*arguments, **options)

        return call

    fsync = os.fsync
    with pytest.MonkeyPatch.context() as patch:
        for name in ("mkdir", "fsync", "replace", "rename"):
            patch.setattr(os, name, refusing(getattr(os, name)))
        yield lambda: count


def test_a_full_disk_at_any_write_ends_the_run_with_a_sentence_and_its_last_checkpoint(
    tmp_path: Path, resolved: ResolvedRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "make_stages", lambda *arguments: FileStages())
    run = in_folder(resolved, tmp_path / "whole")
    with failing(10**9) as operations:
        trained(run)
        total = operations()
    assert checkpoint_step(run) == run.total_steps == 2 * run.phases[0].steps_per_epoch
    assert total > 2 * 2 * (2 * 2 + 1)  # two operations for each file of two checkpoints
    for number in range(total):
        code = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)[number % 5]
        run = in_folder(resolved, tmp_path / f"{number}")
        caplog.clear()
        with pytest.raises((TrainingError, StorageError)) as caught, failing(number, code):
            trained(run)
        told = str(caught.value)
        assert len(told.splitlines()) == 1
        assert str(run.out) in told
        assert os.strerror(code) in told
        assert "rewinding" not in caplog.text
        step = checkpoint_step(run)
        stays = f"last checkpoint: step {step}" if step else "last checkpoint: none"
        assert stays in told or isinstance(caught.value, StorageError)
        assert not list(run.out.rglob(".*.tmp"))
        if number % 4 == 0:  # there is room again
            assert trained(run).stopped is None
            assert checkpoint_step(run) == run.total_steps


def test_a_directory_that_is_renamed_ends_the_run_and_is_not_made_again(
    tmp_path: Path, resolved: ResolvedRun, stages: FileStages
) -> None:
    run = in_folder(resolved, tmp_path / "out")

    class Renaming(NullCallback):
        def on_checkpoint(self, step: int) -> None:
            if run.out.exists():
                run.out.rename(tmp_path / "elsewhere")

    with pytest.raises(
        TrainingError, match=r"out/checkpoints/step-\d+ cannot be written .*was its folder renamed"
    ):
        trained(run, Renaming())
    assert not run.out.exists()
    assert stages.restores == 1


def test_a_directory_that_is_gone_before_the_training_is_not_made_again(
    tmp_path: Path, resolved: ResolvedRun, stages: FileStages
) -> None:
    with claim(tmp_path / "out", resolved.settings) as claimed:
        with claimed.begin():
            atomic_write(claimed.out / "settings.yaml", "name: x")
        run = replace(resolved, out=claimed.out, record=claimed.record)
        run.out.rename(tmp_path / "elsewhere")  # while a search ran, say
        for out in (run.out, run.out / "baseline_mae"):
            with pytest.raises(TrainingError, match="out is gone; was it renamed, removed or unmounted"):
                trained(replace(run, out=out), lease=claimed.lease)
        assert not run.out.exists()


@pytest.mark.parametrize("event", ["on_step", "on_checkpoint"])
def test_a_run_whose_directory_another_process_took_over_commits_nothing_more(
    tmp_path: Path, resolved: ResolvedRun, stages: FileStages, event: str
) -> None:
    settings = resolved.settings
    with claim(tmp_path / "out", settings, resolved.fingerprint) as claimed:
        with claimed.begin():
            atomic_write(claimed.out / "settings.yaml", "name: x")
        run = replace(resolved, out=claimed.out, record=claimed.record)

        def take_over(*arguments: Any) -> None:
            lease = (claimed.out / LEASE).read_text()
            atomic_write(claimed.out / LEASE, lease.replace(claimed.lease.holder.token, "f" * 16))
            if event == "on_step":
                claimed.lease.beat()

        callback = NullCallback()
        setattr(callback, event, take_over)
        with pytest.raises(TrainingError, match=r"out was taken over by process \d+ on "):
            trained(run, callback, lease=claimed.lease)
        assert checkpoint_step(run) == (0 if event == "on_step" else run.phases[0].steps_per_epoch)
    assert (run.out / LEASE).exists()  # the other's


def test_a_run_goes_on_from_its_own_checkpoints_alone(
    tmp_path: Path, resolved: ResolvedRun, stages: FileStages
) -> None:
    run = in_folder(resolved, tmp_path / "out")
    trained(run)
    other = replace(run, settings=run.settings.model_copy(update={"seed": 1}))
    for stranger in (replace(run, record=new_identity(run.fingerprint)), other):
        write_identity(run.out, stranger.record or new_identity())
        with pytest.raises(OutputError, match=r"no checkpoint .* can be resumed from") as caught:
            trained(stranger)
        assert "seed" in str(caught.value) or "it is of the run" in str(caught.value)
    assert run.record is not None
    write_identity(run.out, replace(run.record, has_checkpoint=True))
    assert trained(run).step == run.total_steps


def test_from_scratch_sets_aside_what_cannot_be_read(
    tmp_path: Path, resolved: ResolvedRun, stages: FileStages, caplog: pytest.LogCaptureFixture
) -> None:
    run = in_folder(resolved, tmp_path / "out")
    trained(run)
    assert read_identity(run.out).has_checkpoint  # type: ignore[union-attr]
    for manifest in run.out.glob("checkpoints/*/manifest.json"):
        manifest.write_text("{")
    with pytest.raises(OutputError, match=r"no checkpoint in .* can be resumed from"):
        trained(run)
    from_scratch = replace(
        run, settings=run.settings.model_copy(update={"resume": True, "from_scratch": True})
    )
    assert trained(from_scratch).step == run.total_steps
    (aside,) = run.out.glob("checkpoints.unreadable-*")
    assert [manifest.read_text() for manifest in aside.glob("*/manifest.json")] == ["{"]
    assert f"moved to {aside.name}" in caplog.text
    assert checkpoint_step(run) == run.total_steps


def test_one_damaged_checkpoint_beside_a_valid_one_is_set_aside(
    tmp_path: Path, resolved: ResolvedRun, stages: FileStages
) -> None:
    run = in_folder(resolved, tmp_path / "out")
    run = replace(run, settings=with_changes(run.settings, {"checkpoint.keep": 2}))
    trained(run)
    newest = max(run.out.glob("checkpoints/step-*"))
    (newest / "block-1.safetensors").write_text("torn")
    assert trained(run).step == run.total_steps
    (aside,) = run.out.glob("checkpoints.unreadable-*")
    assert (aside / newest.name / "block-1.safetensors").read_text() == "torn"


def test_what_the_code_of_a_stage_raises_ends_in_a_sentence_and_its_traceback_in_the_log(
    tmp_path: Path, resolved: ResolvedRun, stages: FileStages, caplog: pytest.LogCaptureFixture
) -> None:
    def submit(request: StepRequest) -> StageFailure:
        error, details = KeyError("mine"), "Traceback: in my_target"
        return StageFailure(
            "stage 1 (block 1)", "at step 3", error, process_lost=False, step=3, details=details
        )

    stages.submit = submit  # type: ignore[method-assign]
    caplog.set_level(logging.DEBUG)
    run = in_folder(resolved, tmp_path / "out")
    with pytest.raises(TrainingError) as caught:
        trained(run)
    told = str(caught.value)
    assert told.startswith(
        "stage 1 (block 1) failed at step 3 (KeyError: 'mine'), and a restart did not help; "
    )
    assert "events.log has its traceback, and --verbose shows it; the last checkpoint stays" in told
    assert "in my_target" not in told
    assert caplog.text.count("Traceback: in my_target") == 2
