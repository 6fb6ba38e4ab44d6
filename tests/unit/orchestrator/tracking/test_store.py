"""Addresses of MLflow stores: shown, probed, opened."""

from __future__ import annotations

import os
import socket
import sqlite3
import threading
import time
from pathlib import Path

import pytest

from bim.orchestrator.tracking.store import StoreAddress, exclusive_lock, http_timeouts, summarize_error


def test_passwords_are_never_shown() -> None:
    address = StoreAddress("postgresql://ada:secret@db.example.org:5432/mlflow")
    assert str(address) == "postgresql://ada:***@db.example.org:5432/mlflow"
    assert "secret" not in str(address.ui_command())
    assert StoreAddress("https://ada:secret@example.org").page("#/x") == "https://***@example.org/#/x"
    assert str(StoreAddress("https://ada:secret@example.org")) == "https://***@example.org"


def test_the_default_store_opens_with_the_bare_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for uri in (f"sqlite:///{tmp_path}/mlflow.db", "sqlite:///mlflow.db"):
        assert StoreAddress(uri).ui_command() == "mlflow ui"
        assert StoreAddress(uri).page("#/x") == "http://127.0.0.1:5000/#/x"
        assert StoreAddress(uri).artifact_folder("bim") is None


def test_another_database_keeps_its_files_beside_it(tmp_path: Path) -> None:
    address = StoreAddress(f"sqlite:///{tmp_path}/x.db")
    assert address.artifact_folder("my bim") == f"file://{tmp_path}/mlruns/my-bim"
    assert address.ui_command() == f"mlflow ui --backend-store-uri 'sqlite:///{tmp_path}/x.db'"


def test_a_server_needs_no_command() -> None:
    assert StoreAddress("http://host:5000/").ui_command() is None
    assert StoreAddress("http://host:5000/").page("#/x") == "http://host:5000/#/x"
    assert StoreAddress("http://host:5000").artifact_folder("bim") is None


def test_a_new_database_can_be_made_in_a_new_folder(tmp_path: Path) -> None:
    StoreAddress(f"sqlite:///{tmp_path}/new/x.db").probe()


def test_a_file_that_is_no_database_is_found_out(tmp_path: Path) -> None:
    (tmp_path / "x.db").write_text("some notes " * 1000)
    with pytest.raises(sqlite3.DatabaseError, match="not a database"):
        StoreAddress(f"sqlite:///{tmp_path}/x.db").probe()


def test_a_database_server_that_is_not_there_is_found_out_at_once() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    start = time.monotonic()
    with pytest.raises(ConnectionRefusedError):
        StoreAddress(f"postgresql://a:b@127.0.0.1:{port}/x").probe()
    assert time.monotonic() - start < 60  # MLflow would try for an hour


def test_timeouts_are_restored_and_those_of_the_user_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    with http_timeouts(1, 5):
        assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "1"
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
        with http_timeouts(0, 60):  # of another run that begins
            pass
        assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "1"
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            'API request failed (Caused by NewConnectionError("...: [Errno 111] Connection refused"))',
            "Connection refused",
        ),
        (
            "... Failed to resolve 'nohost' ([Errno -2] Name or service not known)",
            "Name or service not known",
        ),
        (
            "HTTPConnectionPool(host='10.0.0.1'): Connection to 10.0.0.1 timed out. (connect timeout=5)",
            "timed out",
        ),
        ("(sqlite3.OperationalError) database is locked\n[SQL: INSERT]", "database is locked"),
        ("first line\nsecond line", "first line"),
        ("", "ValueError"),
    ],
)
def test_the_cause_of_an_error_is_short(text: str, expected: str) -> None:
    assert summarize_error(ValueError(text)) == expected


def test_one_process_at_a_time_opens_a_sqlite_store(tmp_path: Path) -> None:
    inside, most = 0, 0

    def use() -> None:
        nonlocal inside, most
        with exclusive_lock(StoreAddress(f"sqlite:///{tmp_path}/x.db")):
            inside += 1
            most = max(most, inside)
            time.sleep(0.05)
            inside -= 1

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_another_store_a_server_or_a_process_that_hangs_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = time.monotonic()
    with (
        exclusive_lock(StoreAddress(f"sqlite:///{tmp_path}/a.db")),
        exclusive_lock(StoreAddress(f"sqlite:///{tmp_path}/b.db")),
    ):
        assert time.monotonic() - started < 1
    with (
        exclusive_lock(StoreAddress("http://localhost:5000")),
        exclusive_lock(StoreAddress("http://localhost:5000")),
    ):
        assert time.monotonic() - started < 1
    monkeypatch.setattr("bim.orchestrator.tracking.store.LOCK_TIMEOUT_S", 0.2)
    with (
        exclusive_lock(StoreAddress(f"sqlite:///{tmp_path}/a.db")),
        exclusive_lock(StoreAddress(f"sqlite:///{tmp_path}/a.db")),
    ):
        assert 0.2 < time.monotonic() - started < 2
