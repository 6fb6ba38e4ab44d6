"""Records of a checkpoint: the files that the stages write, and the manifest that commits them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

MANIFEST = "manifest.json"

FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that a run cannot go on from; the message says why."""


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

    Args:
        settings: of the run, as nested plain values.
        facts: what the settings do not say: fingerprint of the images, precision, unreadable images.
        run_id: of the run that wrote it; empty in checkpoints of earlier versions.
    """

    step: int
    steps_per_epoch: int
    settings: dict[str, Any]
    facts: dict[str, Any]
    files: tuple[FileRecord, ...]
    run_id: str = ""
    format: int = FORMAT


FACTS: Mapping[str, type] = {"data": str, "precision": str, "bad_images": dict}
"""Type of the facts that are read again."""


def parse_manifest(content: bytes) -> Manifest:
    """The manifest in a file. Raises CheckpointError for any other content."""
    try:
        raw = json.loads(content)
    except (ValueError, RecursionError):  # UnicodeDecodeError among them
        raise CheckpointError("it is not JSON") from None
    if not isinstance(raw, dict):
        raise CheckpointError("it is not a JSON object")
    if raw.get("format") != FORMAT:
        raise CheckpointError(f"format {_shortened(raw.get('format'))}, this version reads {FORMAT}")
    facts = _value(raw, "facts", dict)
    for name in FACTS.keys() & facts.keys():
        _value(facts, name, FACTS[name])
    files = tuple(_file_record(entry) for entry in _value(raw, "files", list))
    if not files:
        raise CheckpointError("it names no files")
    return Manifest(
        step=_value(raw, "step", int),
        steps_per_epoch=_value(raw, "steps_per_epoch", int),
        settings=_value(raw, "settings", dict),
        facts=facts,
        files=files,
        run_id=_value({"run_id": "", **raw}, "run_id", str),
    )


def parse_manifest_of(step: int, content: bytes) -> Manifest:
    """The manifest of the checkpoint after `step` updates. Raises CheckpointError for any other content."""
    try:
        manifest = parse_manifest(content)
    except CheckpointError as error:
        raise CheckpointError(f"unreadable manifest ({error})") from None
    if manifest.step != step:
        raise CheckpointError(f"its manifest is that of step {manifest.step}")
    return manifest


def checkpoint_problems(checks: Mapping[str, Callable[[], Manifest]]) -> dict[str, str]:
    """Folder -> why a run cannot go on from it, of those with which something is wrong.

    checks: folder -> what returns its manifest, or raises CheckpointError.
    """
    problems = {}
    for folder, check in checks.items():
        try:
            check()
        except CheckpointError as error:
            problems[folder] = str(error)
    return problems


def _file_record(entry: Any) -> FileRecord:
    if not isinstance(entry, dict):
        raise CheckpointError(f"files has {_shortened(entry)} in place of a file")
    record = FileRecord(
        **{
            field.name: _value(entry, field.name, str if field.name == "name" else int)
            for field in fields(FileRecord)
        }
    )
    if record.name in ("", ".", "..") or "/" in record.name or "\0" in record.name:
        raise CheckpointError(f"{_shortened(record.name)} is not the name of a file in its folder")
    return record


def _value(values: Mapping[str, Any], name: str, kind: type) -> Any:
    value = values.get(name)
    if type(value) is not kind or (isinstance(value, int) and value < 0):
        raise CheckpointError(f"{name} is {_shortened(value)}")
    return value


def _shortened(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
