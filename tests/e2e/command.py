"""The main job as the end-to-end tests call it: in this process where Ray does not matter, else as a user's shell would."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from sklearn.datasets import load_digits

from bim.orchestrator.evaluation import metrics
from bim.orchestrator.runs import step_times
from bim.pipelines import bim_pipeline

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "pipelines" / "bim_pipeline.py"

DEPTHS = (1, 2, 3, 4)
TINY = {
    "recipe": "digits_demo",
    "backbone.model_args": "{img_size: 16, patch_size: 4, embed_dim: 32, depth: 4, num_heads: 2}",
    "decoder.dim": "32",
    "decoder.num_heads": "1",
    "data.workers": "0",
    "schedule.epochs": "2",
    "schedule.warmup_epochs": "0",
    "placement.threads_per_stage": "1",
    "placement.backend": "in_process",
    "search.trials": "0",
    "evaluation.latency": "false",
}
"""Four blocks of one layer; two epochs in this process."""

LONG = {"data.batch_size": "8", "schedule.epochs": "60", "checkpoint.every_epochs": "5"}
"""With the 42 training images of `unlabeled`: 300 steps, a checkpoint every 25, time enough to be interrupted."""


@dataclass(frozen=True)
class Finished:
    """How a command ended and what it left."""

    status: int
    stdout: str
    stderr: str
    out: Path


def arguments(*changes: Mapping[str, str]) -> list[str]:
    """Settings as command-line arguments; later ones win."""
    settings: dict[str, str] = {}
    for change in changes:
        settings |= change
    return [word for key, value in settings.items() for word in (f"--{key}", value)]


def call(argv: Sequence[str], out: Path = Path()) -> Finished:
    """Run the command in this process.

    Its linear probes take few iterations, to the optimum they would take most of a tiny run, and few steps are timed.
    """
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        patch.setattr(metrics, "PROBE_ITERATIONS", 10)
        patch.setattr(step_times, "PROBE_S", 0.5)
        status = bim_pipeline.main(argv)
    return Finished(status, stdout.getvalue(), stderr.getvalue(), out)


def main_job(out: Path, source: Path, store: str, **changes: str) -> Finished:
    """A tiny run in this process, as long as `LONG`; setting names have `__` for their dot."""
    where = {"out": str(out), "data.source": str(source), "tracking.uri": store}
    given = {key.replace("__", "."): value for key, value in changes.items()}
    return call(arguments(TINY, LONG, where, given), out)


@contextmanager
def started(argv: Sequence[str], cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """The command as a shell starts it: a process group of its own, its output readable line by line."""
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *argv],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:  # the test failed: leave nothing running
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def shell(argv: Sequence[str], cwd: Path, out: Path = Path()) -> Finished:
    """Run the command as a process of its own, to its end."""
    with started(argv, cwd) as process:
        stdout, stderr = process.communicate()
    return Finished(process.returncode, stdout, stderr, out)


def read_until(process: subprocess.Popen[str], wanted: Callable[[str], bool]) -> list[str]:
    """Lines of standard output up to the first that is wanted; all of them if there is none."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if wanted(line):
            break
    return lines


def image_folder(root: Path, pattern: str, count: int, first: int = 0) -> Path:
    """Scanned digits first..first+count-1 as files below `root`, named by {number} and, if wanted, {label}."""
    for number in range(first, first + count):
        file = root / pattern.format(number=f"{number:04d}", label=DIGITS.target[number])
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(number))
    return root


def png(number: int) -> bytes:
    """Scanned digit `number`, 16 x 16 pixels, as the bytes of a PNG file."""
    scan = (DIGITS.images[number] * 15.9375).astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    file = io.BytesIO()
    Image.fromarray(scan).save(file, format="PNG")
    return file.getvalue()


DIGITS = load_digits()


def variant_weights(out: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every exported depth variant."""
    return {
        f"{file.parent.name}/{name}": value
        for file in sorted((out / "variants").glob("*/model.safetensors"))
        for name, value in safetensors.torch.load_file(file).items()
    }


def differing(a: Path, b: Path) -> list[str]:
    """Names of exported tensors that two runs do not have bit for bit alike; both have some."""
    left, right = variant_weights(a), variant_weights(b)
    assert left
    assert left.keys() == right.keys()
    return [name for name in left if not torch.equal(left[name], right[name])]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content, and every directory."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
    }
