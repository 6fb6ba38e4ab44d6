"""Checkpoints on disk: files that stages write, commits of the driver, and the check before a run resumes from one.

A checkpoint is a folder `OUT/checkpoints/step-00000500/` of safetensors files, written by the stages one by one, and a
`manifest.json` that the driver renames into place last. No manifest, no checkpoint. Nothing is pickled. Below a URL
(`remote_checkpoints`) stages write and read the same files.
"""

from __future__ import annotations

import json
import logging
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
from torch import Tensor

from bim.orchestrator.files import atomic_write
from bim.orchestrator.training.errors import CheckpointDamagedError
from bim.orchestrator.training.manifest import MANIFEST, FileRecord, Manifest, read_manifest
from bim.orchestrator.training.spec import PretrainSpec
from bim.orchestrator.training.storage import Location, is_url

if TYPE_CHECKING:
    from bim.orchestrator.training.remote_checkpoints import RemoteFolder

log = logging.getLogger(__name__)


def save_block(
    directory: Location, index: int, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> list[FileRecord]:
    """Write one block's weights (`encoder.*`, `decoder.*`) and optimizer state, without a manifest."""
    if is_url(directory):
        write = _remote_folder(str(directory)).save
        return [
            write(f"block-{index}.safetensors", safetensors.torch.save(dict(weights))),
            write(f"block-{index}.optimizer.safetensors", safetensors.torch.save(dict(state))),
        ]
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
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
    """Weights of block `index`: the whole `LocalMIM` state, keys `encoder.*` and `decoder.*`."""
    return _load(checkpoint, f"block-{index}.safetensors")


def load_block_state(checkpoint: Location, index: int) -> dict[str, Tensor]:
    """Optimizer state of block `index`, as `BlockTrainer.state_dict` returned it."""
    return _load(checkpoint, f"block-{index}.optimizer.safetensors")


def _load(checkpoint: Location, name: str) -> dict[str, Tensor]:
    if is_url(checkpoint):
        return _remote_folder(str(checkpoint)).load(name)
    return safetensors.torch.load_file(Path(checkpoint) / name)


def _remote_folder(url: str) -> RemoteFolder:
    from bim.orchestrator.training.remote_checkpoints import open_remote_folder

    return open_remote_folder(url)


class CheckpointStore:
    """The checkpoints of one run, below `OUT/checkpoints`. Only the driver uses it.

    Args:
        keep: number of committed checkpoints to keep; a commit removes older ones.
    """

    def __init__(self, out: Path, keep: int = 2) -> None:
        self._root = out / "checkpoints"
        self._keep = keep

    def directory(self, step: int) -> Path:
        """The folder of the checkpoint after `step` updates, committed or not."""
        return self._root / f"step-{step:08d}"

    def commit(self, manifest: Manifest) -> Path:
        """Rename the manifest into place and remove checkpoints that are no longer kept. Returns the folder."""
        directory = self.directory(manifest.step)
        directory.mkdir(parents=True, exist_ok=True)
        atomic_write(directory / MANIFEST, json.dumps(asdict(manifest), indent=1))
        for stale_tmp in directory.glob(".*.tmp"):  # left by a stage that was killed during a write
            stale_tmp.unlink(missing_ok=True)
        committed = [path for path in self._newest_first() if (path / MANIFEST).exists()]
        # A later checkpoint was skipped as damaged; otherwise the run would have continued from it.
        superseded = [path for path in committed if path.name > directory.name]
        for path in superseded + [path for path in committed if path not in superseded][self._keep :]:
            shutil.rmtree(path, ignore_errors=True)
        return directory

    def latest(self, warn: bool = False) -> Manifest | None:
        """The newest valid checkpoint, or None.

        warn: log a warning for every newer one that is skipped because it is incomplete or damaged.
        """
        for directory in self._newest_first():
            error = _integrity_error(directory)
            if error is None:
                return read_manifest(directory)
            if warn:
                log.warning("checkpoint %s skipped: %s", directory.name, error)
        return None

    def reject(self, error: CheckpointDamagedError) -> None:
        """Files on a disk are checked before stages read them: see `latest`."""
        raise error

    def clear_uncommitted(self) -> None:
        """Remove folders without a manifest, which an interrupted run left. Only while no stage is running."""
        for directory in self._newest_first():
            if not (directory / MANIFEST).exists():
                shutil.rmtree(directory, ignore_errors=True)

    def _newest_first(self) -> list[Path]:
        return sorted(self._root.glob("step-*"), reverse=True)


def _integrity_error(directory: Path) -> str | None:
    """The first reason why a checkpoint folder cannot be loaded; None if its manifest and files are valid."""
    if not (directory / MANIFEST).exists():
        return "no manifest (incomplete write)"
    try:
        manifest = read_manifest(directory)
    except (ValueError, KeyError, TypeError) as error:
        return f"unreadable manifest ({error})"
    for record in manifest.files:
        path = directory / record.name
        if not path.exists():
            return f"{record.name} is missing"
        if path.stat().st_size != record.size:
            return f"{record.name} has {path.stat().st_size} of {record.size} bytes"
        if _crc32(path) != record.crc32:
            return f"{record.name} has a wrong checksum"
    return None


def _crc32(path: Path, chunk_bytes: int = 1 << 22) -> int:
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(chunk_bytes):
            value = zlib.crc32(chunk, value)
    return value
