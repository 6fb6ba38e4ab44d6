"""A search whose driver is killed at any moment, in processes of its own, and continued."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray import tune

from bim.orchestrator.files import atomic_write
from bim.orchestrator.search.record import FOLDER, load_result
from bim.orchestrator.search.spec import TrialSpec

pytestmark = pytest.mark.nightly

PROGRAM = """
import sys
from pathlib import Path
import ray
from tests.integration.test_search_killed import checkpointing_trials
from tests.integration.test_search_tune import Callback, run
from bim.orchestrator.search import tuner
ray.init(
    address="local", num_cpus=2, include_dashboard=False, object_store_memory=128 << 20, log_to_driver=False,
    logging_level="ERROR",
)
tuner.make_trainable = checkpointing_trials
run(Path(sys.argv[1]), Callback(), trials=4)
"""


def checkpointing_trials(spec: TrialSpec) -> Callable[[dict[str, Any]], None]:
    """In place of `make_trainable`: as a real trial it continues from its last epoch, whose score it reports again."""

    def trial(config: dict[str, Any]) -> None:
        number = config["number"]
        checkpoint = Path(spec.folder) / str(number) / "epoch"
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        first = int(checkpoint.read_text()) if checkpoint.exists() else 1
        for epoch in range(first, 5):
            time.sleep(0.1)
            atomic_write(checkpoint, str(epoch))
            score = 0.5 + 0.1 * ((number * 7 + epoch * 3) % 5)
            tune.report({"epoch": epoch, "score": score, "depths": {"2": score}, "gflops": 1.0})

    return trial


def num_scores(out: Path) -> int:
    result = load_result(out)
    return 0 if result is None else sum(len(row.curve) for row in result.rows)


def test_a_driver_that_is_killed_again_and_again_ends_with_the_result_of_the_unbroken_search(
    tmp_path: Path,
) -> None:
    def start(out: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", PROGRAM, str(out)], cwd=Path(__file__).parents[2])

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for out in (whole, killed):
        out.mkdir()
    assert start(whole).wait(timeout=300) == 0
    rng = random.Random(5)
    for moment in (1, 4, 7):
        process = start(killed)
        deadline = time.monotonic() + 300
        while num_scores(killed) < moment and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        process.wait()
    assert start(killed).wait(timeout=300) == 0
    expected = load_result(whole)
    assert expected is not None
    assert expected.finished
    assert load_result(killed) == expected
    assert {path.name for path in (killed / FOLDER).iterdir()} == {
        path.name for path in (whole / FOLDER).iterdir()
    }
