"""Checkpoints on disk: files that stages write, commits of the driver, and the check before a run resumes from one.

A checkpoint is a folder `OUT/checkpoints/step-00000500/` of safetensors files, written by the stages one by one, and a
`manifest.json` that the driver renames into place last. No manifest, no checkpoint. Nothing is pickled. Below a URL
(`remote_checkpoints`) stages write and read the same files.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
from torch import Tensor

from bim.orchestrator.files import StorageError, atomic_write, make_folder, storage_errors
from bim.orchestrator.training.checkpoint_check import has_manifest, intact_manifest, read_manifest, step_of
from bim.orchestrator.training.errors import CheckpointDamagedError
from bim.orchestrator.training.manifest import (
    MANIFEST,
    CheckpointError,
    FileRecord,
    Manifest,
    checkpoint_problems,
)
from bim.orchestrator.training.spec import PretrainSpec
from bim.orchestrator.training.storage import Location, is_url

if TYPE_CHECKING:
    from bim.orchestrator.training.remote_checkpoints import RemoteFolder

log = logging.getLogger(__name__)


def save_block(
    directory: Location, index: int, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> list[FileRecord]:
    """Write one block's weights (`encoder.*`, `decoder.*`) and optimizer state, without a manifest.

    Raises:
        StorageError: the file system or the storage refuses, or the folder above `directory` is gone.
    """
    if is_url(directory):
        write = _remote_folder(str(directory)).save
        return [
            write(f"block-{index}.safetensors", safetensors.torch.save(dict(weights))),
            write(f"block-{index}.optimizer.safetensors", safetensors.torch.save(dict(state))),
        ]
    directory = Path(directory)
    make_folder(directory)
    return [
        _write(directory / f"block-{index}.safetensors", safetensors.torch.save(dict(weights))),
        _write(directory / f"block-{index}.optimizer.safetensors", safetensors.torch.save(dict(state))),
    ]


def _write(path: Path, data: bytes) -> FileRecord:
    atomic_write(path, data)
    return FileRecord(path.name, len(data), zlib.crc32(data))


def load_weights(checkpoint: Location, spec: PretrainSpec) -> list[dict[str, Tensor]]:
    """The weights of every block of a checkpoint folder, block 0 first; see `load_block_weights`."""
    return [load_block_weights(checkpoint, index) for index in range(len(spec.blocks))]


def load_block_weights(checkpoint: Location, index: int) -> dict[str, Tensor]:
    """Weights of block `index`: the whole `LocalMIM` state, keys `encoder.*` and `decoder.*`. Raises StorageError."""
    return _load(checkpoint, f"block-{index}.safetensors")


def load_block_state(checkpoint: Location, index: int) -> dict[str, Tensor]:
    """Optimizer state of block `index`, as `BlockTrainer.state_dict` returned it. Raises StorageError."""
    return _load(checkpoint, f"block-{index}.optimizer.safetensors")


def _load(checkpoint: Location, name: str) -> dict[str, Tensor]:
    if is_url(checkpoint):
        return _remote_folder(str(checkpoint)).load(name)
    path = Path(checkpoint) / name
    with storage_errors(path, "read"):
        return safetensors.torch.load_file(path)


def _remote_folder(url: str) -> RemoteFolder:
    from bim.orchestrator.training.remote_checkpoints import open_remote_folder

    return open_remote_folder(url)


class CheckpointStore:
    """The checkpoints of one run, below `OUT/checkpoints`. Only the driver uses it.

    Args:
        keep: number of committed checkpoints to keep; a commit removes older ones.
        objection: why a checkpoint is not one of this run, e.g. that another run wrote it; None if it is.
        before_commit: called before every commit; what it raises ends the run without the commit.
        after_commit: called after every commit.
        is_kept: whether the checkpoint of a step stays although it is older.
    """

    def __init__(
        self,
        out: Path,
        keep: int = 2,
        objection: Callable[[Manifest], str | None] = lambda manifest: None,
        before_commit: Callable[[], None] = lambda: None,
        after_commit: Callable[[], None] = lambda: None,
        is_kept: Callable[[int], bool] = lambda step: False,
    ) -> None:
        self._root = out / "checkpoints"
        self._keep = keep
        self._objection = objection
        self._before_commit, self._after_commit = before_commit, after_commit
        self._is_kept = is_kept

    @property
    def root(self) -> Path:
        """The folder of all checkpoints."""
        return self._root

    @property
    def aside_name(self) -> str:
        """Where `set_aside` moves checkpoints, for messages."""
        return f"{self._root.name}.unreadable-TIME"

    def make_root(self) -> None:
        """Make the folder of all checkpoints, once, when a run begins: one that goes later on is not made again.

        Raises:
            StorageError: the file system refuses, or there is no output directory.
        """
        make_folder(self._root)

    def directory(self, step: int) -> Path:
        """The folder of the checkpoint after `step` updates, committed or not."""
        return self._root / f"step-{step:08d}"

    def commit(self, manifest: Manifest) -> Path:
        """Rename the manifest into place and remove checkpoints that are no longer kept. Returns the folder.

        Raises:
            StorageError: the file system refuses; the checkpoints before it stay.
        """
        self._before_commit()
        directory = self.directory(manifest.step)
        make_folder(directory)
        atomic_write(directory / MANIFEST, json.dumps(asdict(manifest), indent=1))
        with suppress(OSError):
            for stale_tmp in directory.glob(".*.tmp"):  # left by a stage that was killed during a write
                stale_tmp.unlink(missing_ok=True)
        committed = [path for path in self._newest_first() if has_manifest(path)]
        # A later checkpoint was skipped as damaged; otherwise the run would have continued from it.
        superseded = [path for path in committed if step_of(path) > manifest.step]
        self._move_aside(superseded)
        for path in [path for path in committed if path not in superseded][self._keep :]:
            if not self._is_kept(step_of(path)):
                _remove(path)
        self._after_commit()
        return directory

    def latest(self, warn: bool = False) -> Manifest | None:
        """The newest valid checkpoint of this run, or None.

        warn: log a warning for every newer one that is skipped because it is incomplete, damaged or of another run.
        """
        for directory in self._newest_first():
            try:
                return self._valid_manifest(directory)
            except CheckpointError as error:
                if warn:
                    log.warning("checkpoint %s skipped: %s", directory.name, error)
        return None

    def problems(self, uncommitted: bool = False) -> dict[str, str]:
        """Folder -> why the run cannot go on from it, for every checkpoint with which something is wrong, the newest first.

        uncommitted: also those without a manifest, which an interrupted run leaves.
        """
        return checkpoint_problems(
            {
                directory.name: partial(self._valid_manifest, directory)
                for directory in self._newest_first()
                if uncommitted or has_manifest(directory)
            }
        )

    def run_ids(self) -> set[str]:
        """The run ids in all manifests that can be read; an empty one stands for those without."""
        ids = set()
        for directory in self._newest_first():
            with suppress(CheckpointError):
                ids.add(read_manifest(directory).run_id)
        return ids

    def set_aside(self, names: Iterable[str]) -> Path | None:
        """Move checkpoints, by the names of their folders, to `checkpoints.unreadable-TIME/`, which is returned.

        Raises:
            StorageError: the file system refuses.
        """
        folders = [self._root / name for name in names]
        if not folders:
            return None
        aside = _unused(
            self._root.with_name(f"{self._root.name}.unreadable-{time.strftime('%Y%m%d-%H%M%S')}")
        )
        make_folder(aside)
        for folder in folders:
            with storage_errors(folder, "moved"):
                folder.rename(aside / folder.name)
        return aside

    def reject(self, error: CheckpointDamagedError) -> None:
        """Raises the error: files on a disk are checked before stages read them, see `latest`."""
        raise error

    def clear_uncommitted(self) -> None:
        """Remove folders without a manifest, which an interrupted run left. Only while no stage is running."""
        for directory in self._newest_first():
            if not has_manifest(directory):
                shutil.rmtree(directory, ignore_errors=True)

    def _valid_manifest(self, directory: Path) -> Manifest:
        """The manifest of a folder, if it and its files are valid and of this run. Raises CheckpointError."""
        manifest = intact_manifest(directory)
        objection = self._objection(manifest)
        if objection is not None:
            raise CheckpointError(objection)
        return manifest

    def _move_aside(self, folders: Sequence[Path]) -> None:
        """`set_aside`, after a commit, which is not undone where the file system refuses this."""
        try:
            aside = self.set_aside(folder.name for folder in folders)
        except StorageError as error:
            log.warning("%s", error)
            return
        if aside is not None:
            names = ", ".join(folder.name for folder in folders)
            log.warning("%s cannot be read: moved to %s", names, aside)

    def _newest_first(self) -> list[Path]:
        """Every folder of a checkpoint. Raises StorageError where the file system refuses to list them."""
        try:
            names = os.listdir(self._root)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            cause = error.strerror or str(error)
            raise StorageError(error.errno, f"cannot be read ({cause})", str(self._root)) from error
        folders = [self._root / name for name in names if re.fullmatch(r"step-[0-9]{8,18}", name)]
        return sorted(folders, key=step_of, reverse=True)


def _remove(directory: Path) -> None:
    """Remove a checkpoint, the manifest first: what a death in between leaves is not committed."""
    with suppress(OSError):
        (directory / MANIFEST).unlink()
        shutil.rmtree(directory, ignore_errors=True)


def _unused(path: Path) -> Path:
    """`path`, or with a number behind it if that exists."""
    candidates = itertools.chain([path], (path.with_name(f"{path.name}-{n}") for n in itertools.count(2)))
    return next(candidate for candidate in candidates if not os.path.lexists(candidate))
