"""The head of a cluster is lost: the run ends with a sentence, and continues elsewhere."""

from __future__ import annotations

import os
import signal

import psutil
import pytest
import ray

from tests.integration.nodes import NEEDS_MOUNTS, several_nodes, started_job, wait_until


@pytest.mark.nightly
@NEEDS_MOUNTS
def test_a_lost_head_ends_the_run_with_the_command_that_resumes_it_elsewhere() -> None:
    """The GCS holds the state of the cluster in its memory; a new one knows none of the actors."""
    with several_nodes((1, 1)) as nodes:
        ray.shutdown()  # a driver whose head is gone is ended by Ray
        out = nodes.shared / "headless"
        job = started_job(nodes, out)
        wait_until(lambda: any(out.glob("checkpoints/*/manifest.json")) or job.poll() is not None, 300)
        (gcs,) = [
            child
            for child in psutil.Process(nodes.head.pid).children(recursive=True)
            if child.name() == "gcs_server"
        ]
        os.kill(gcs.pid, signal.SIGKILL)
        text, _ = job.communicate(timeout=300)
        assert job.returncode == 1, text
        assert "--resume" in text
        assert "Traceback" not in text
        resumed = started_job(nodes, out, "--resume", joins=False)
        text, _ = resumed.communicate(timeout=300)
        assert resumed.returncode == 0, text
