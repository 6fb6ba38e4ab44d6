"""The tiny job that `pipelines/benchmark.py faults` interrupts, and what a finished run of it leaves, to be compared.

Two blocks on the scanned digits, 228 steps, a checkpoint every 10, a loader with a worker process of its own.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from bim.orchestrator.data.digits import DigitsSource
from bim.orchestrator.tracking.stored_values import stored_values
from bim.orchestrator.training.checkpoint import CheckpointStore

JOB = {
    "recipe": "digits_demo",
    "blocks": "2",
    "backbone.model_args": "{img_size: 16, patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}",
    "decoder.dim": "32",
    "decoder.num_heads": "1",
    # 179 images to train on in 19 steps. With less than 20 steps an epoch, metrics are logged after every step; with more,
    # the mean over several steps depends on where a rewind falls.
    "data.val_fraction": "0.1",
    "data.test_fraction": "0.8",
    "data.batch_size": "9",
    "data.workers": "1",
    "schedule.epochs": "12",
    "schedule.warmup_epochs": "1",
    "checkpoint.every_epochs": "0.5",
    "checkpoint.every_minutes": "1000",  # on a slow machine too, checkpoints are those of the epochs
    "placement.threads_per_stage": "1",
    "search.trials": "0",
    "evaluation.latency": "false",
}
"""Settings of the job."""

STEPS, CHECKPOINT_STEPS = 228, 10
"""Of the job, and from one checkpoint to the next."""

TIMINGS = ("stage", "data/wait_s", "data/load_s", "images_per_s")
"""What the names of metrics that are measured in seconds begin with."""

IMAGES = 199

UNLABELED = {"data.test_fraction": "0"}
"""What differs for the images in a folder; without labels, no probe is trained, which would take most of the time."""

PLACE_KEYS = ("out", "resume", "placement.", "tracking.")
"""Settings that say where a run takes place, and not what it computes."""

MAY_BE_MISSING = ("events.log",)
"""Artifacts that a run has if something happened to it."""


def write_images(folder: Path) -> None:
    """Write the first digits as `IMAGES` files below a new folder, without labels."""
    source = DigitsSource()
    folder.mkdir()
    for number in range(IMAGES):
        image = Image.fromarray(source.load(number).permute(1, 2, 0).numpy())
        image.save(folder / f"{number:04d}.png")


def command(out: Path, tracking_uri: str, name: str, resume: bool, images: Path | None = None) -> list[str]:
    """The command that starts or resumes the job.

    name: of its experiment and its registered model.
    images: the folder of `write_images`; None: all digits, with their labels.
    """
    where = {"out": str(out), "tracking.uri": tracking_uri}
    where |= {"tracking.experiment": name, "tracking.model_name": name}
    if images is not None:
        where |= UNLABELED | {"data.source": str(images)}
    words = [word for key, value in (JOB | where).items() for word in (f"--{key}", value)]
    return [sys.executable, "-m", "bim.pipelines.bim_pipeline", *words, *(["--resume"] if resume else [])]


@dataclass(frozen=True)
class Outcome:
    """What a run left that does not depend on the time or the place, by name."""

    values: Mapping[str, object]

    def differing(self, other: Outcome) -> list[str]:
        """Names whose values are not the same in both."""
        names = sorted(self.values.keys() | other.values.keys())
        return [name for name in names if self.values.get(name) != other.values.get(name)]


def read_outcome(out: Path, tracking_uri: str, name: str) -> Outcome:
    """What the run in `out` and its experiment `name` hold.

    Raises:
        OSError, ValueError: the run has not come to its end.
    """
    records = {key: value for key, value in stored_values(tracking_uri, name).items() if _is_comparable(key)}
    return Outcome(dict(_files(out)) | records)


def _files(out: Path) -> Iterator[tuple[str, object]]:
    manifest = CheckpointStore(out).latest()
    if manifest is None:
        raise FileNotFoundError(f"no valid checkpoint in {out}")
    yield "checkpoint/step", manifest.step
    for record in manifest.files:
        yield f"checkpoint/{record.name}", (record.size, record.crc32)
    for file in sorted([*out.glob("variants/*/*.safetensors"), *out.glob("decoders/*.safetensors")]):
        yield str(file.relative_to(out)), hashlib.sha256(file.read_bytes()).hexdigest()
    metrics: dict[str, dict[int, float]] = {}
    for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for metric in row.keys() - {"step", "time"}:
            metrics.setdefault(metric, {})[row["step"]] = row[metric]
    for metric, values in metrics.items():
        if not metric.startswith(TIMINGS):
            yield f"metrics.jsonl/{metric}", tuple(sorted(values.items()))


def _is_comparable(key: str) -> bool:
    """Whether a value in MLflow is the same in all runs: no timing, no place, no record of an event."""
    _, kind, name = (*key.split("/", 2), "", "")[:3]
    ignored = {"metrics": TIMINGS, "params": PLACE_KEYS, "artifacts": MAY_BE_MISSING}
    return not name.startswith(ignored.get(kind, ("\0",)))
