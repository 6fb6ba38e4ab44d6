"""Checkpoints on disk: what a stage writes, what the driver commits, what a resumed run may trust.

A checkpoint is a folder `OUT/checkpoints/step-00000500/` of safetensors files, written by the stages one by one, and a
`manifest.json` that the driver renames into place last. No manifest, no checkpoint. Nothing is pickled.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from bim.orchestrator.files import atomic_write

MANIFEST = "manifest.json"

FORMAT = 1


@dataclass(frozen=True)
class FileRecord:
    """A file of a checkpoint, as it was when it was written."""

    name: str
    size: int
    crc32: int


@dataclass(frozen=True)
class Manifest:
    """The commit of a checkpoint.

    `step` counts the optimizer updates that are in the weights, which is also the next step to run; batches are
    indexed by step, so it is the sample position too.
    """

    step: int
    steps_per_epoch: int
    settings: dict[str, Any]
    facts: dict[str, Any]
    files: tuple[FileRecord, ...]
    format: int = FORMAT


def save_block(
    directory: Path, index: int, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> list[FileRecord]:
    """Write one block's weights (`encoder.*`, `decoder.*`) and optimizer state; the manifest is the driver's."""
    directory.mkdir(parents=True, exist_ok=True)
    return [
        _write(directory / f"block-{index}.safetensors", safetensors.torch.save(dict(weights))),
        _write(directory / f"block-{index}.optimizer.safetensors", safetensors.torch.save(dict(state))),
    ]


def _write(path: Path, data: bytes) -> FileRecord:
    atomic_write(path, data)
    return FileRecord(path.name, len(data), zlib.crc32(data))


def load_block_weights(directory: Path, index: int) -> dict[str, Tensor]:
    """Weights of block `index`: the whole `LocalMIM` state, keys `encoder.*` and `decoder.*`."""
    return safetensors.torch.load_file(directory / f"block-{index}.safetensors")


def load_block_state(directory: Path, index: int) -> dict[str, Tensor]:
    """Optimizer state of block `index`, as `BlockTrainer.state_dict` gave it."""
    return safetensors.torch.load_file(directory / f"block-{index}.optimizer.safetensors")


class CheckpointStore:
    """The checkpoints of one run, below `OUT/checkpoints`. Only the driver uses it.

    Args:
        keep: how many committed checkpoints stay; older ones are removed after a commit.
        say: called with one sentence when a checkpoint is passed over.
    """

    def __init__(self, out: Path, keep: int = 2, say: Callable[[str], None] = print) -> None:
        self._root = out / "checkpoints"
        self._keep = keep
        self._say = say

    def directory(self, step: int) -> Path:
        """Where the checkpoint after `step` updates lies, committed or not."""
        return self._root / f"step-{step:08d}"

    def commit(self, manifest: Manifest) -> Path:
        """Rename the manifest into place and remove checkpoints that are no longer kept. Returns the directory."""
        directory = self.directory(manifest.step)
        directory.mkdir(parents=True, exist_ok=True)
        atomic_write(directory / MANIFEST, json.dumps(asdict(manifest), indent=1))
        for torn in directory.glob(".*.tmp"):  # left by a stage that was killed while it wrote
            torn.unlink(missing_ok=True)
        committed = [d for d in self._newest_first() if (d / MANIFEST).exists()]
        # What stands beyond this step was passed over as damaged, or the run would not be here.
        void = [d for d in committed if d.name > directory.name]
        for old in void + [d for d in committed if d not in void][self._keep :]:
            shutil.rmtree(old, ignore_errors=True)
        return directory

    def latest(self) -> Manifest | None:
        """The newest checkpoint that is whole; one that was cut short is passed over, and that is said."""
        for directory in self._newest_first():
            flaw = self._flaw(directory)
            if flaw is None:
                return read_manifest(directory)
            self._say(f"checkpoint {directory.name} is passed over: {flaw}")
        return None

    def clear_uncommitted(self) -> None:
        """Remove what a run that was cut off left unfinished. Only while no stage is running."""
        for directory in self._newest_first():
            if not (directory / MANIFEST).exists():
                shutil.rmtree(directory, ignore_errors=True)

    def _newest_first(self) -> list[Path]:
        return sorted(self._root.glob("step-*"), reverse=True)

    def _flaw(self, directory: Path) -> str | None:
        if not (directory / MANIFEST).exists():
            return "it was never committed"
        try:
            manifest = read_manifest(directory)
        except (ValueError, KeyError, TypeError) as error:
            return f"its manifest cannot be read ({error})"
        for record in manifest.files:
            path = directory / record.name
            if not path.exists():
                return f"{record.name} is missing"
            if path.stat().st_size != record.size:
                return f"{record.name} has {path.stat().st_size} of {record.size} bytes"
            if _crc32(path) != record.crc32:
                return f"{record.name} does not have the bytes that were written"
        return None


def read_manifest(directory: Path) -> Manifest:
    """Read a committed manifest. Raises ValueError or KeyError if it is not one of ours."""
    raw = json.loads((directory / MANIFEST).read_text())
    if raw["format"] != FORMAT:
        raise ValueError(f"format {raw['format']}, this version reads {FORMAT}")
    files = tuple(FileRecord(**record) for record in raw["files"])
    return Manifest(raw["step"], raw["steps_per_epoch"], raw["settings"], raw["facts"], files)


def _crc32(path: Path, chunk: int = 1 << 22) -> int:
    value = 0
    with open(path, "rb") as file:
        while data := file.read(chunk):
            value = zlib.crc32(data, value)
    return value


def all_files(records: Iterable[Iterable[FileRecord]]) -> tuple[FileRecord, ...]:
    """Flatten the records of all stages, sorted by name so that equal checkpoints have equal manifests."""
    return tuple(sorted((r for stage in records for r in stage), key=lambda r: r.name))
