"""The output directory: held by one process at a time, never overwritten silently, resumed only by the run that made it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from bim.orchestrator.config.recipes import SAVED_SETTINGS, RecipeError, read_recipe
from bim.orchestrator.config.schema import Settings, SettingsError
from bim.orchestrator.config.transforms import differing_keys, flat
from bim.orchestrator.config.validate import settings_from_mapping
from bim.orchestrator.files import remove_temporary_files
from bim.orchestrator.runs.checkpoints import RunCheckpoints, checkpoint_store
from bim.orchestrator.runs.lease import LEASE, Lease, LeaseHeldError, LeaseLostError, System, acquire, holder
from bim.orchestrator.runs.run_identity import (
    RUN_FILE,
    OutputError,
    RunIdentity,
    new_identity,
    read_identity,
    write_identity,
)
from bim.orchestrator.training.manifest import MANIFEST

NEW_RUN_HINT = "start a new run with another --out"

MAKE_ATTEMPTS = 5
"""Another process that is refused removes the directory that it has just made."""


def check_output(
    out: Path,
    settings: Settings,
    fingerprint: str,
    remedy: str = NEW_RUN_HINT,
    apply_search: Callable[[Settings], Settings] = lambda saved: saved,
) -> None:
    """Refuse a directory that this run may not use. Writes nothing.

    Args:
        remedy: what the user does to train with other settings than those of the run in it.
        apply_search: saved settings -> the same with the best values of a finished search of that run.

    Raises:
        OutputError: in use by another run; nothing there to resume; resumed with settings or data that contradict it; or
            none of its checkpoints can be read.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"out is {out}, which is a file; give --out a directory that is new or empty")
    nearest = next(folder for folder in (out, *out.parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        problem = "may not be written to" if nearest.is_dir() else "is a file"
        raise OutputError(
            f"out cannot be {out}: {nearest} {problem}; give --out a directory that can be made"
        )
    _check_not_held(out)
    if not settings.resume:
        _check_unused(out)
        return
    if (out / SAVED_SETTINGS).exists() and not (out / SAVED_SETTINGS).is_file():
        raise OutputError(f"{out / SAVED_SETTINGS} is not a file; put the settings of the run back")
    if not (out / SAVED_SETTINGS).exists():
        raise OutputError(f"there is no run to resume in {out}; leave --resume out to start one there")
    record = resumed_record(out)
    check_resumable(open_store(out, record), record, settings.from_scratch)
    _check_same(out, settings, fingerprint, remedy, apply_search)


def check_resumable(store: RunCheckpoints, record: RunIdentity, from_scratch: bool) -> None:
    """Refuse to begin again at step 0 where there were checkpoints, unless that is asked for.

    Raises:
        OutputError: none of them can be read; the message has what is wrong with each.
    """
    if from_scratch or store.latest() is not None:
        return
    problems = store.problems(uncommitted=record.has_checkpoint)
    if problems:
        listed = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
        raise OutputError(
            f"no checkpoint in {store.root} can be resumed from ({listed}); repair them, or begin again at step 0 with "
            f"--resume --from-scratch, which moves them to {store.aside_name}"
        )
    if record.has_checkpoint:
        raise OutputError(
            f"the checkpoints of the run are gone from {store.root}; put them back, or begin again at step 0 with "
            "--resume --from-scratch"
        )


def saved_settings(out: Path) -> dict[str, Any]:
    """The settings of the run in an output directory, as nested plain values, unchecked.

    Raises:
        OutputError: the file cannot be read.
    """
    try:
        return read_recipe(str(out / SAVED_SETTINGS))
    except RecipeError as error:
        raise OutputError(f"{error}; put the settings of the run back") from error


def resumed_record(out: Path) -> RunIdentity:
    """The record of a run that is resumed; where it has none, an id is taken from its checkpoints, or made.

    Raises:
        OutputError: the record cannot be read; or it is missing, and the checkpoints are of several runs.
    """
    record = read_identity(out)
    if record is not None:
        return record
    store = checkpoint_store(out)
    ids = store.run_ids()
    record = new_identity(adopted=not ids or "" in ids, has_checkpoint=(out / "summary.json").exists())
    ids.discard("")
    if len(ids) > 1:
        raise OutputError(
            f"{out / RUN_FILE} is missing, and the checkpoints in {store.root} are of several runs "
            f"({', '.join(sorted(ids))}); remove those of the others"
        )
    return replace(record, run_id=ids.pop(), has_checkpoint=True) if ids else record


def open_store(out: Path, record: RunIdentity | None = None) -> RunCheckpoints:
    """The checkpoints of an output directory that are of the run in it, or of `record`. Raises StorageError."""
    record = record or read_identity(out)
    return checkpoint_store(out) if record is None else checkpoint_store(out, objection=record.objection)


class Claim:
    """An output directory that this process alone may write in; see `claim`.

    Attributes:
        record: of the run, written by `begin`.
        begun: whether the run has begun: what is in a directory that is new stays.
    """

    def __init__(self, out: Path, lease: Lease, record: RunIdentity) -> None:
        self.out, self.lease, self.record = out, lease, record
        self.begun = False

    @contextmanager
    def begin(self) -> Iterator[None]:
        """Write the record of the run; inside, what makes it one is written. If that raises, it has not begun."""
        write_identity(self.out, self.record)
        yield
        self.begun = True


@contextmanager
def claim(out: Path, settings: Settings, fingerprint: str = "") -> Iterator[Claim]:
    """Make an output directory, hold its lease and check that it is new or the run's own, as one step.

    A directory that is new goes again if what is inside raises before the run has begun.

    Raises:
        OutputError: another process holds it, or used it meanwhile; or the system refuses it.
    """
    record = resumed_record(out) if settings.resume else new_identity(fingerprint)
    new: list[Path] = []
    claimed: Claim | None = None
    try:
        with ExitStack() as stack:
            lease = _make_and_hold(out, record.run_id, new, stack)
            if settings.resume:
                now = read_identity(out)
                if now is not None and now.run_id != record.run_id:
                    raise OutputError(f"another process has used {out} meanwhile; try again")
                record = replace(now or record, data=(now or record).data or fingerprint)
            else:
                _check_unused(out)
            claimed = Claim(out, lease, record)
            try:
                yield claimed
            finally:
                if out in new and not claimed.begun:
                    _empty(out)
    finally:
        if claimed is None or not claimed.begun:
            with suppress(OSError):  # another process may use it, or a folder above it
                for folder in new:
                    folder.rmdir()


def remove_unfinished_files(out: Path, leases: Iterable[Lease]) -> None:
    """Remove what killed processes left of their writes, unless another process holds a lease by now and may be writing."""
    with suppress(LeaseLostError):
        for lease in leases:
            lease.check()
        remove_temporary_files(out)


def _make_and_hold(out: Path, run_id: str, new: list[Path], stack: ExitStack) -> Lease:
    """Make the directory and enter its lease; the folders that did not exist are appended to `new`, the lowest first."""
    for attempt in range(MAKE_ATTEMPTS):
        try:
            missing = [folder for folder in (out, *out.parents) if not folder.exists()]
            out.mkdir(parents=True, exist_ok=True)
            new += [folder for folder in missing if folder not in new]
            return stack.enter_context(acquire(out, run_id))
        except LeaseHeldError as error:
            raise _in_use(out, str(error)) from error
        except OSError as error:
            if isinstance(error, FileNotFoundError) and attempt < MAKE_ATTEMPTS - 1:
                continue
            raise OutputError(
                f"the output directory {out} cannot be made or written to ({error.strerror or error}); choose another one "
                "with --out"
            ) from error
    raise AssertionError("the last attempt returns or raises")


def _check_unused(out: Path) -> None:
    """Raise OutputError for a directory that has anything but a lease in it."""
    if not out.exists():
        return
    try:
        names = os.listdir(out)
    except OSError as error:
        raise OutputError(f"the output directory {out} cannot be read ({error.strerror})") from error
    if any(not name.removeprefix(".").startswith(LEASE) for name in names):
        raise OutputError(
            f"the output directory {out} is in use; continue its run with --resume, or choose another one with --out"
        )


def _check_not_held(out: Path) -> None:
    """Raise OutputError where a process of this machine holds the directory; one of another machine is waited for later."""
    with suppress(OSError):
        process = holder(out)
        if process is not None and process.machine == System().machine:
            raise _in_use(out, str(process))


def _in_use(out: Path, process: str) -> OutputError:
    return OutputError(
        f"the output directory {out} is in use by {process}; wait until it has ended, or choose another one with --out"
    )


def _empty(out: Path) -> None:
    """Remove everything but the lease."""
    with suppress(OSError):
        for path in out.iterdir():
            if path.name == LEASE:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _check_same(
    out: Path,
    settings: Settings,
    fingerprint: str,
    remedy: str,
    apply_search: Callable[[Settings], Settings],
) -> None:
    record = read_identity(out)
    store = open_store(out, record)
    latest = store.latest()
    saved = saved_settings(out) if latest is None else latest.settings
    try:
        # A search may have ended just before its best values were saved.
        before = apply_search(settings_from_mapping(saved))
    except SettingsError as error:
        raise OutputError(
            f"the run in {out} was made with settings that this version does not know: {error}"
        ) from error
    keys = differing_keys(settings, before)
    recorded = (latest.facts.get("data") if latest is not None else None) or (record.data if record else "")
    if not recorded and settings.backbones is None and settings.data.source != before.data.source:
        keys = sorted([*keys, "data.source"])  # nothing says that the images are the same
    if settings.backbones is not None and before.backbones is not None:
        # Each backbone has a folder, and what it was trained with, of its own: some may be new, some left out.
        keys = [key for key in keys if key.partition(".")[0] not in ("backbone", "backbones")]
    if keys:
        old, new = flat(before), flat(settings)
        changes = "; ".join(f"{key} is {new.get(key)}, was {old.get(key)}" for key in keys)
        raise OutputError(
            f"{out} cannot be resumed with other settings than it was trained with: {changes}; "
            f"give the same ones, or {remedy}"
        )
    if recorded and fingerprint and recorded != fingerprint:
        file = f"{Path(store.directory(latest.step)).name}/{MANIFEST}" if latest is not None else RUN_FILE
        raise OutputError(
            f"the images behind data.source have changed since the last checkpoint in {out} ({file}); {remedy}"
        )
