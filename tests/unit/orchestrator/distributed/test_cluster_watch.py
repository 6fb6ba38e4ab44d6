"""The watch over the head of a cluster, with probes that the tests answer."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from bim.orchestrator.distributed import cluster
from bim.orchestrator.distributed.cluster_watch import ClusterWatch, is_reachable
from bim.orchestrator.training.errors import ClusterLostError

HEAD = {"the head of the Ray cluster": "10.0.0.1:6379"}


def test_three_failed_probes_in_a_row_are_a_loss() -> None:
    answers = [False, False, True, False, False, False]
    watch = ClusterWatch(HEAD, probe=lambda address: answers.pop(0))
    for _ in range(5):
        watch.look()
        assert watch.lost is None
    watch.look()
    assert watch.lost == "the head of the Ray cluster at 10.0.0.1:6379"


def test_where_nobody_looks_the_process_ends_with_the_sentence(caplog: pytest.LogCaptureFixture) -> None:
    ended = threading.Event()
    watch = ClusterWatch(HEAD, lambda address: False, ended.set, interval_s=0.01, grace_s=0.01)
    watch.start()
    assert ended.wait(5)
    assert caplog.messages == [
        "the head of the Ray cluster at 10.0.0.1:6379 is lost; start Ray again if it is yours, and continue with --resume"
    ]


def test_a_watch_that_is_stopped_ends_nothing() -> None:
    ended = threading.Event()
    watch = ClusterWatch(HEAD, lambda address: False, ended.set, interval_s=0.01, grace_s=0.2)
    watch.start()
    while watch.lost is None:
        time.sleep(0.001)
    watch.stop()
    assert not ended.wait(0.4)


def test_a_loss_is_raised_where_the_job_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.raise_if_cluster_lost()
    watch = ClusterWatch(HEAD, probe=lambda address: False)
    monkeypatch.setattr(cluster, "_watch", watch)
    cluster.raise_if_cluster_lost()
    for _ in range(3):
        watch.look()
    with pytest.raises(ClusterLostError, match=r"10\.0\.0\.1:6379 is lost; .* --resume"):
        cluster.raise_if_cluster_lost()


def test_an_address_is_reachable_while_something_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert is_reachable(address)
    assert not is_reachable(address)
