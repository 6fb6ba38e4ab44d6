"""A Ray of this machine: who can reach it, where its sockets are, and why it does not start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from bim.orchestrator.distributed import local_ray
from bim.orchestrator.distributed.local_ray import secure_local_ray, short_temp_dir, start_error
from bim.orchestrator.files import LOCK, remove_stale_folders


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a process that has not imported Ray, of a user without a token."""
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    monkeypatch.setattr(local_ray, "TOKEN_FILE", tmp_path / "auth_token")


@pytest.mark.usefixtures("without_ray")
def test_a_ray_of_this_machine_asks_for_a_token_of_this_process_and_listens_on_loopback() -> None:
    first: dict[str, str] = {}
    second: dict[str, str] = {}
    secure_local_ray(first)
    secure_local_ray(second)
    assert first["RAY_AUTH_MODE"] == "token"
    assert len(first["RAY_AUTH_TOKEN"]) == 64
    assert first["RAY_AUTH_TOKEN"] != second["RAY_AUTH_TOKEN"]
    assert first["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize(
    "given",
    [
        {"RAY_ADDRESS": "10.0.0.1:6379"},
        {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"},
    ],
)
def test_what_the_user_has_set_stays(given: dict[str, str]) -> None:
    environment = dict(given)
    secure_local_ray(environment)
    assert environment == given


@pytest.mark.usefixtures("without_ray")
def test_a_token_that_exists_is_used(tmp_path: Path) -> None:
    (tmp_path / "auth_token").write_text("mine")
    environment: dict[str, str] = {}
    secure_local_ray(environment)
    assert "RAY_AUTH_TOKEN" not in environment


def test_sockets_are_in_the_usual_place_where_they_fit(tmp_path: Path) -> None:
    with short_temp_dir({"TMPDIR": "/tmp"}) as folder:
        assert folder is None


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_directory_too_long_for_sockets_is_replaced_for_the_time_of_the_run(
    tmp_path: Path, variable: str
) -> None:
    long = tmp_path / ("slurm-job-" * 6)
    long.mkdir()
    with short_temp_dir({variable: str(long)}) as folder:
        assert folder is not None
        assert len(folder) + local_ray.SOCKET_BELOW_TEMP < local_ray.SOCKET_PATH_MAX
        assert Path(folder).stat().st_mode & 0o077 == 0
    assert not Path(folder).exists()


def test_the_directory_of_a_run_that_was_killed_is_removed_by_the_next_and_that_of_a_living_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_ray, "SHORT_PARENTS", (str(tmp_path),))
    killed = tmp_path / f"{local_ray.PRIVATE_TEMP_PREFIX}killed"
    (killed / "session").mkdir(parents=True)
    (killed / LOCK).touch()
    long = {"TMPDIR": "/tmp/" + "slurm-job-" * 9}
    with short_temp_dir(long) as living:
        assert living is not None
        assert not killed.exists()
        remove_stale_folders(local_ray.PRIVATE_TEMP_PREFIX, tmp_path)
        assert Path(living).exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device"), "disk of its temporary directory is full"),
        (ValueError("AF_UNIX path length cannot exceed 107 bytes: ..."), "RAY_TMPDIR to a short one"),
        (OSError(98, "Address already in use"), "no free port"),
        (MemoryError(), "too little memory (its object store alone takes 512 MB)"),
        (ValueError("The configured object store size exceeds available memory"), "too little memory"),
        (OSError(24, "Too many open files"), "ulimit -n"),
        (PermissionError(13, "Permission denied", "/tmp/ray"), "may not be written to"),
        (RuntimeError("Failed to start GCS.\nmore\nlines"), "Failed to start GCS"),
    ],
)
def test_why_ray_does_not_start_is_one_sentence_with_a_remedy(error: Exception, words: str) -> None:
    sentence = start_error(error, 512 << 20)
    assert words in sentence
    assert "\n" not in sentence
    assert sentence.endswith("or train without Ray: --placement.backend in_process")


def test_a_process_that_the_user_starts_beside_ray_outlives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    daemons: list[subprocess.Popen[bytes]] = []

    def sleeper() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])

    monkeypatch.setattr(ray, "init", lambda **options: daemons.append(sleeper()))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with local_ray.local_ray():
        of_the_user = sleeper()
    try:
        assert not psutil.pid_exists(daemons[0].pid)
        assert of_the_user.poll() is None
    finally:
        of_the_user.kill()
        of_the_user.wait()
