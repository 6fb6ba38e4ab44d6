"""The checkpoints of one run, opened for its training: only its own are read, and none is lost in silence."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bim.orchestrator.config.schema import Settings, SettingsError
from bim.orchestrator.config.transforms import differing_keys
from bim.orchestrator.config.validate import settings_from_mapping
from bim.orchestrator.files import StorageError, make_folder
from bim.orchestrator.runs.checkpoints import (
    RunCheckpoints,
    checkpoint_store,
    read_storage_record,
    record_storage,
)
from bim.orchestrator.runs.lease import Lease
from bim.orchestrator.runs.output_dir import check_resumable, open_store
from bim.orchestrator.runs.prepare import ResolvedRun
from bim.orchestrator.runs.run_identity import OutputError, RunIdentity, read_identity, write_identity
from bim.orchestrator.text import first_line
from bim.orchestrator.training.manifest import Manifest
from bim.orchestrator.training.remote_checkpoints import RemoteCheckpointStore
from bim.orchestrator.training.restart_policy import disk_sentence

log = logging.getLogger(__name__)


def open_run_store(
    run: ResolvedRun, lease: Lease | None = None, is_kept: Callable[[int], bool] = lambda step: False
) -> RunCheckpoints:
    """The checkpoints that a training goes on from and adds to; no stage may be running.

    What an interrupted process left uncommitted is removed. Checkpoints that cannot be read are moved aside: beside others
    that can, or if the settings ask to begin from scratch.

    Args:
        lease: of the output directory, without which nothing is committed.
        is_kept: whether the checkpoint of a step stays although it is older than `checkpoint.keep`.

    Raises:
        OutputError: there were checkpoints and none can be read.
        StorageError: the file system refuses.
    """
    out, settings = run.out, run.settings
    if lease is not None:
        lease.check()  # a directory that is gone by now is not made again
    if run.record is None:
        make_folder(out.parent)  # of the trials of a search
    make_folder(out)
    record_storage(out, settings)
    record = None if run.record is None else read_identity(out) or replace(run.record, has_checkpoint=False)
    marked = record is None or record.has_checkpoint

    def objection(manifest: Manifest) -> str | None:
        return (record and record.objection(manifest)) or _other_settings(manifest, settings)

    def mark() -> None:
        nonlocal marked
        if not marked and record is not None:
            try:
                write_identity(out, replace(record, has_checkpoint=True))
            except StorageError as error:  # the checkpoint is committed; the next one marks it
                log.warning("%s", error)
            else:
                marked = True

    store = checkpoint_store(
        out,
        settings.checkpoint.keep,
        objection=objection,
        before_commit=(lambda: None) if lease is None else lease.check,
        after_commit=mark,
        is_kept=is_kept,
    )
    if record is not None:
        check_resumable(store, record, settings.from_scratch)
        is_readable = store.latest() is not None
        unreadable = store.problems(uncommitted=not is_readable and record.has_checkpoint)
        aside = store.set_aside(unreadable)
        if aside is not None:
            log.warning(
                "%s moved to %s", ", ".join(f"{k} ({v})" for k, v in unreadable.items()), Path(aside).name
            )
        if record.has_checkpoint and not is_readable:
            record = replace(record, has_checkpoint=False)
            marked = False
        write_identity(out, record)
    store.clear_uncommitted()
    return store


def storage_failure(
    error: OSError, out: Path, record: RunIdentity | None = None, store: RunCheckpoints | None = None
) -> str:
    """The sentence with which a run ends whose file system or storage refuses, with the checkpoint that stays.

    Args:
        store: the checkpoints of the run, if they were opened; one that is away is not asked.
    """
    if isinstance(store, RemoteCheckpointStore):
        step = store.committed_step
        return disk_sentence(error, "none" if step is None else f"step {step}")
    try:
        if store is None and read_storage_record(out) is not None:
            return disk_sentence(error, "unknown")
        latest = open_store(out, record).latest()
    except (OutputError, StorageError):
        return disk_sentence(error, "unknown")
    none = "none" if out.is_dir() else "unknown"
    return disk_sentence(error, none if latest is None else f"step {latest.step}")


def _other_settings(manifest: Manifest, settings: Settings) -> str | None:
    try:
        keys = differing_keys(settings_from_mapping(manifest.settings), settings)
    except SettingsError as error:
        return f"this version does not know its settings: {first_line(error)}"
    return f"it was trained with other values of {', '.join(keys)}" if keys else None
