"""Checkpoints below a URL.

An object store cannot rename. So the folder of a checkpoint is `step-00000500-RANDOM/`: what a process of an earlier
attempt still writes lands in another folder, and the PUT of one object, the manifest, commits all the others. It tells
their sizes and checksums: sizes are compared with the listing, the checksum of a file when it is read.
"""

from __future__ import annotations

import errno
import json
import logging
import secrets
import time
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from functools import lru_cache, partial

import safetensors.torch
from torch import Tensor

from bim.orchestrator.files import StorageError
from bim.orchestrator.training.errors import CheckpointDamagedError
from bim.orchestrator.training.manifest import (
    MANIFEST,
    CheckpointError,
    FileRecord,
    Manifest,
    checkpoint_problems,
    parse_manifest,
    parse_manifest_of,
)
from bim.orchestrator.training.object_store import ObjectStore

DAMAGED = "damaged.txt"
"""Marks a checkpoint of which a file was read that is not as it was written; says which."""

log = logging.getLogger(__name__)


class RemoteFolder:
    """The objects of one checkpoint, for a stage. Raises StorageError where the storage refuses."""

    def __init__(self, url: str) -> None:
        self._objects = ObjectStore(url)
        self._records: dict[str, FileRecord] | None = None

    def save(self, name: str, data: bytes) -> FileRecord:
        """Write a file."""
        self._objects.write(name, data)
        return FileRecord(name, len(data), zlib.crc32(data))

    def load(self, name: str) -> dict[str, Tensor]:
        """The tensors of a file. Raises CheckpointDamagedError if it is not as it was written."""
        record, content = self._record(name), self._objects.read(name)
        if content is None:
            raise self._damage(f"{name} is missing")
        if len(content) != record.size:
            raise self._damage(f"{name} has {len(content)} of {record.size} bytes")
        if zlib.crc32(content) != record.crc32:
            raise self._damage(f"{name} has a wrong checksum")
        return safetensors.torch.load(content)

    def _record(self, name: str) -> FileRecord:
        if self._records is None:
            try:
                manifest = parse_manifest(self._objects.read(MANIFEST) or b"")
            except CheckpointError as error:
                raise self._damage(f"unreadable manifest ({error})") from error
            self._records = {record.name: record for record in manifest.files}
        if name not in self._records:
            raise self._damage(f"{name} is not in the manifest")
        return self._records[name]

    def _damage(self, reason: str) -> CheckpointDamagedError:
        return CheckpointDamagedError(self._objects.url.rpartition("/")[2], reason)


@lru_cache(maxsize=2)  # the manifest is read once for all files
def open_remote_folder(url: str) -> RemoteFolder:
    """The folder of one checkpoint, as the driver named it."""
    return RemoteFolder(url)


class RemoteCheckpointStore:
    """The checkpoints of one run, below a URL that it has to itself. Only the driver uses it.

    Args:
        keep: number of committed checkpoints to keep; a commit removes older ones.
        retry_for_s: how long a request that fails is repeated; None: as long as in training.
        objection: why a checkpoint is not one of this run; None if it is.
        before_commit: called before every commit; what it raises ends the run without the commit.
        after_commit: called after every commit.
        is_kept: whether the checkpoint of a step stays although it is older.

    Every method raises StorageError where the storage refuses, or cannot be reached.
    """

    def __init__(
        self,
        url: str,
        keep: int = 2,
        retry_for_s: float | None = None,
        objection: Callable[[Manifest], str | None] = lambda manifest: None,
        before_commit: Callable[[], None] = lambda: None,
        after_commit: Callable[[], None] = lambda: None,
        is_kept: Callable[[int], bool] = lambda step: False,
    ) -> None:
        self.url = url.rstrip("/")
        self._objects = ObjectStore(url, retry_for_s)
        self._keep = keep
        self._objection = objection
        self._before_commit, self._after_commit = before_commit, after_commit
        self._is_kept = is_kept
        self._folders: dict[int, str] = {}
        """Step -> name of the folder, of checkpoints that are written to or were returned by `latest`."""
        self.committed_step: int | None = None
        """The step of the checkpoint that the run would go on from, as this process knows it."""
        self._rejected: dict[str, str] = {}
        """Name of a committed folder -> why the run cannot go on from it."""

    @property
    def root(self) -> str:
        """The URL."""
        return self.url

    @property
    def aside_name(self) -> str:
        """Where `set_aside` moves checkpoints, for messages."""
        return "unreadable-TIME below it"

    def run_ids(self) -> set[str]:
        """The run ids in all manifests that can be read; an empty one stands for those without."""
        ids = set()
        for name, files in self._list().items():
            if MANIFEST in files:
                with suppress(CheckpointError):
                    ids.add(parse_manifest(self._objects.read(f"{name}/{MANIFEST}") or b"").run_id)
        return ids

    def make_root(self) -> None:
        """An object store needs no folders."""

    def directory(self, step: int) -> str:
        """The folder of the checkpoint after `step` updates: that of the manifest that `latest` returned, else a new one
        to write into, the same until the next `latest`."""
        name = self._folders.setdefault(step, f"step-{step:08d}-{secrets.token_hex(4)}")
        return f"{self.url}/{name}"

    def committed(self, step: int) -> str | None:
        """The folder to read the checkpoint after `step` updates from; None if there is none."""
        for name, files in self._list().items():
            if _step_of(name) == step and MANIFEST in files and DAMAGED not in files:
                return f"{self.url}/{name}"
        return None

    def commit(self, manifest: Manifest) -> str:
        """Write the manifest, last of all, and remove checkpoints that are no longer kept. Returns the folder."""
        self._before_commit()
        url = self.directory(manifest.step)
        name = url.rpartition("/")[2]
        self._check_sole_writer(manifest.step)
        self._objects.write(f"{name}/{MANIFEST}", json.dumps(asdict(manifest), indent=1).encode())
        self.committed_step = manifest.step
        try:
            self._remove_obsolete(name)
        except StorageError as error:  # this one is committed; the next one removes them
            log.debug("older checkpoints stay for now: %s", error)
        self._after_commit()
        return url

    def latest(self, warn: bool = False) -> Manifest | None:
        """The newest valid checkpoint of this run, or None; of its files the sizes are compared.

        warn: log a warning for every newer one that is skipped because it is incomplete, damaged or of another run.
        """
        self._folders.clear()
        for name, files in self._list().items():
            try:
                manifest = self._valid_manifest(name, files)
            except CheckpointError as error:
                if MANIFEST in files:
                    self._rejected[name] = str(error)
                if warn:
                    log.warning("checkpoint %s skipped: %s", name, error)
            else:
                self._folders[manifest.step] = name
                self.committed_step = manifest.step
                return manifest
        self.committed_step = None
        return None

    def problems(self, uncommitted: bool = False) -> dict[str, str]:
        """Folder -> why the run cannot go on from it, for every checkpoint with which something is wrong, the newest first.

        uncommitted: also those without a manifest, which an interrupted run leaves.
        """
        return checkpoint_problems(
            {
                name: partial(self._valid_manifest, name, files)
                for name, files in self._list().items()
                if uncommitted or MANIFEST in files
            }
        )

    def set_aside(self, names: Iterable[str]) -> str | None:
        """Move checkpoints, by the names of their folders, to `unreadable-TIME/`, which is returned."""
        aside = f"unreadable-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        folders = list(names)
        for name in folders:
            self._objects.move(name, f"{aside}/{name}")
        return f"{self.url}/{aside}" if folders else None

    def reject(self, error: CheckpointDamagedError) -> None:
        """Skip a checkpoint from now on, in later processes too, that turned out to be damaged while it was read."""
        log.warning("%s", error)
        self._rejected[error.checkpoint] = error.reason
        self._objects.write(f"{error.checkpoint}/{DAMAGED}", error.reason.encode())

    def clear_uncommitted(self) -> None:
        """Remove folders without a manifest, which an interrupted run left. Only while no stage is running."""
        self._remove({name: files for name, files in self._list().items() if MANIFEST not in files})

    def remove_all(self) -> None:
        """Remove every checkpoint."""
        self._remove(self._list())

    def _valid_manifest(self, name: str, files: dict[str, int]) -> Manifest:
        """The manifest of a folder. Raises CheckpointError with the first reason why the run cannot go on from it."""
        if MANIFEST not in files:
            raise CheckpointError("no manifest (incomplete write)")
        if name in self._rejected:
            raise CheckpointError(self._rejected[name])
        if DAMAGED in files:
            raise CheckpointError((self._objects.read(f"{name}/{DAMAGED}") or b"").decode(errors="replace"))
        manifest = parse_manifest_of(_step_of(name), self._objects.read(f"{name}/{MANIFEST}") or b"")
        for record in manifest.files:
            if record.name not in files:
                raise CheckpointError(f"{record.name} is missing")
            if files[record.name] != record.size:
                raise CheckpointError(f"{record.name} has {files[record.name]} of {record.size} bytes")
        if (objection := self._objection(manifest)) is not None:
            raise CheckpointError(objection)
        return manifest

    def _check_sole_writer(self, step: int) -> None:
        """Two copies of an output directory have the same URL, and no lease that tells them."""
        for name, files in self._list().items():
            if _step_of(name) > step and MANIFEST in files and name not in self._rejected:
                reason = f"has a checkpoint of step {_step_of(name)}, which this process did not write"
                hint = "does a copy of the output directory train too?"
                raise StorageError(errno.EBUSY, f"{reason}; {hint}", self.url)

    def _remove_obsolete(self, newest: str) -> None:
        """After the commit of `newest`."""
        folders = self._list()
        committed = [name for name, files in folders.items() if MANIFEST in files]
        # A later checkpoint was skipped as damaged; otherwise the run would have continued from it.
        later = [name for name in committed if _step_of(name) > _step_of(newest)]
        if later:
            log.warning("%s cannot be read: moved to %s", ", ".join(later), self.set_aside(later))
        same_step = [name for name in committed if _step_of(name) == _step_of(newest) and name != newest]
        remaining = [name for name in committed if name not in later + same_step]
        unfinished = folders.keys() - {*committed, *self._folders.values()}
        older = [name for name in remaining[self._keep :] if not self._is_kept(_step_of(name))]
        obsolete = [*same_step, *older, *unfinished]
        self._remove({name: folders[name] for name in obsolete})

    def _remove(self, folders: dict[str, dict[str, int]]) -> None:
        for name, files in folders.items():
            # The manifest first: a folder of which a part is removed is no checkpoint any more.
            for group in (files.keys() & {MANIFEST}, files.keys() - {MANIFEST}):
                if group:
                    self._objects.remove([f"{name}/{file}" for file in sorted(group)])

    def _list(self) -> dict[str, dict[str, int]]:
        """Folder -> its files and their sizes, the newest first."""
        folders: dict[str, dict[str, int]] = {}
        for path, size in self._objects.sizes().items():
            folder, _, name = path.partition("/")
            if _step_of(folder) >= 0 and name:
                folders.setdefault(folder, {})[name] = size
        return dict(sorted(folders.items(), reverse=True))


def _step_of(name: str) -> int:
    """The step in the name of a folder; -1 if it is not that of a checkpoint."""
    number = name.removeprefix("step-").partition("-")[0]
    return int(number) if name.startswith("step-") and number.isdecimal() else -1
