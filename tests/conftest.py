"""Quiet surroundings for every test, and which tests may run at the same time."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

os.environ.setdefault("RAY_AUTH_MODE", "token")  # as a run that starts Ray
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# By default Ray's workers yield to every other process, such as the unit tests on the other core.
os.environ.setdefault("RAY_worker_niceness", "0")

# A suite in the background of a shell, or under nohup, would hand ignored signals on to the commands that it tests.
for number, handler in (
    (signal.SIGHUP, signal.SIG_DFL),
    (signal.SIGQUIT, signal.SIG_DFL),
    (signal.SIGINT, signal.default_int_handler),
):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

TESTS = Path(__file__).parent

# Worker processes of Ray and of the data loader import classes of test modules by name.
sys.path.insert(0, str(TESTS.parent))


@pytest.fixture(autouse=True)
def own_tracking_uri() -> Iterator[None]:
    """A run in this process that left MLflow's default store set would hand it on to the commands of later tests."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    yield
    if os.environ.get("MLFLOW_TRACKING_URI") != before:
        sys.modules["mlflow"].set_tracking_uri(before)  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """A command that runs in this process, also one for a fixture of many tests, configures the logger `bim` for itself."""
    logger = logging.getLogger("bim")
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)
    yield
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)


SHARED_RAY = "tests/integration/"
"""Tests that share one Ray; those below `tests/e2e` call commands, which start their own."""

WITHOUT_RAY = ("tests/integration/test_quickstart.py", "tests/integration/test_resume.py")
"""Tests among these that start no Ray."""


class RayTestsOnOneWorker(LoadScopeScheduling):
    """Tests that share a Ray run on one worker process of pytest-xdist; the others run beside them, file by file.

    Not the marks of `--dist loadgroup`: pytest-xdist 3.8 passes over them under pytest 9.2.
    """

    def _split_scope(self, nodeid: str) -> str:
        if nodeid.startswith(SHARED_RAY) and not nodeid.startswith(WITHOUT_RAY):
            return "ray"
        # Tests of one file of the end-to-end tests share what takes long to make.
        return nodeid if nodeid.startswith("tests/unit/") else nodeid.partition("::")[0]


LONGEST_FIRST = (SHARED_RAY, "tests/e2e/test_kills.py", "tests/e2e/")
"""What begins first where pytest-xdist runs, so that no worker is left with a long file at the end."""


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # by the number of tests, which says little of their time


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        ranks = [k for k, prefix in enumerate(LONGEST_FIRST) if item.nodeid.startswith(prefix)]
        return min(ranks, default=len(LONGEST_FIRST))

    items.sort(key=rank)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return RayTestsOnOneWorker(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Captured lines with file names that are not UTF-8 cannot be sent by pytest-xdist."""
    report = yield
    report.sections = [(name, text.encode(errors="replace").decode()) for name, text in report.sections]
    return report
