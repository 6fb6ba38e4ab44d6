"""Records of a checkpoint: the files that the stages write, and the manifest that commits them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"

FORMAT = 1


@dataclass(frozen=True)
class FileRecord:
    """Name, size in bytes and checksum of a file as it was written."""

    name: str
    size: int
    crc32: int


@dataclass(frozen=True)
class Manifest:
    """The commit of a checkpoint.

    `step` counts the optimizer updates that are in the weights, which is also the next step to run. Batches are
    indexed by step, so it is the position in the data too.
    """

    step: int
    steps_per_epoch: int
    settings: dict[str, Any]
    facts: dict[str, Any]
    files: tuple[FileRecord, ...]
    format: int = FORMAT


def read_manifest(directory: Path) -> Manifest:
    """Read a committed manifest. Raises ValueError, KeyError or TypeError if its content is not a manifest."""
    return parse_manifest((directory / MANIFEST).read_bytes())


def parse_manifest(content: bytes) -> Manifest:
    """The manifest in a file; raises as `read_manifest` does."""
    raw = json.loads(content)
    if raw["format"] != FORMAT:
        raise ValueError(f"format {raw['format']}, this version reads {FORMAT}")
    files = tuple(FileRecord(**record) for record in raw["files"])
    return Manifest(raw["step"], raw["steps_per_epoch"], raw["settings"], raw["facts"], files)
