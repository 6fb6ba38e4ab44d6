"""Processes of an interrupted run: which one is the victim of a kill, and what is left when the run has ended."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import psutil

STAGE, LOADER, EVALUATION = "ray::StageActor", "ray::LoaderActor", "ray::evaluate_checkpoint"
"""How Ray titles the processes of a run."""

DATA_WORKER = "bim.orchestrator.data.prefetch"
"""In the command of a worker process of the loader."""

TOKEN = "BIM_FAULTS_TOKEN"
"""Variable that every process of a run inherits."""

RAYLET = "raylet"

SHARED_MEMORY = Path("/dev/shm")

END_TIMEOUT_S, KILLED_TIMEOUT_S = 5.0, 90.0
"""Seconds after the end of a driver in which all its processes go away; after its own kill, those of its Ray have to notice
the loss one after the other, which takes longer on a loaded machine."""

POLL_INTERVAL_S = 0.2


def title(process: psutil.Process) -> str:
    """The command line, or the title that Ray gave the process; empty if it is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


class ProcessTree:
    """The processes of this machine and their parents at one moment."""

    def __init__(self) -> None:
        self._children: dict[int, list[psutil.Process]] = {}
        for process in psutil.process_iter(["ppid"]):
            self._children.setdefault(process.info["ppid"], []).append(process)

    def below(self, pids: Iterable[int]) -> list[psutil.Process]:
        """The descendants of some processes."""
        processes: list[psutil.Process] = []
        parents = list(pids)
        while parents:
            children = self._children.get(parents.pop(0), [])
            processes += children
            parents += [child.pid for child in children]
        return processes


def victims(kind: str, tree: ProcessTree, driver: int, raylets: Sequence[int]) -> list[psutil.Process]:
    """The processes of one kind of a run.

    Args:
        kind: "stage", "loader", "data-worker", "driver" or "raylet".
        raylets: of the cluster that the run joined; none if the driver started Ray.
    """
    if kind == "driver":
        return [psutil.Process(driver)] if psutil.pid_exists(driver) else []
    if kind == "raylet":  # of a node on which a part of the run lives
        return [
            psutil.Process(pid)
            for pid in raylets
            if any(title(child).startswith((STAGE, LOADER)) for child in tree.below([pid]))
        ]
    titled = [(process, title(process)) for process in tree.below([driver, *raylets])]
    if kind == "data-worker":
        return [process for process, text in titled if DATA_WORKER in text]
    start = {"stage": STAGE, "loader": LOADER}[kind]
    return [process for process, text in titled if text.startswith(start)]


class Remains:
    """Everything that a run starts, seen while it is running, and what of it is still there after its end.

    Args:
        token: the value of `TOKEN` in the driver's environment.
        out: the output directory.
        raylets: of the cluster that the run joins; they and their idle workers stay.
    """

    def __init__(self, token: str, out: Path, raylets: Callable[[], Iterable[int]]) -> None:
        self._token, self._out, self._raylets = token, out, raylets
        self._seen: dict[tuple[int, float], psutil.Process] = {}
        self._shared_before = _names(SHARED_MEMORY)

    def look(self, tree: ProcessTree, driver: int) -> None:
        """Note the processes that the run has now."""
        ours = tree.below([driver])
        of_nodes = [
            process
            for process in tree.below(self._raylets())
            if title(process).startswith((STAGE, LOADER, EVALUATION)) or DATA_WORKER in title(process)
        ]
        for process in [*ours, *of_nodes]:
            try:
                self._seen[process.pid, process.create_time()] = process
            except psutil.Error:
                continue

    def wait_for_processes(self, timeout_s: float) -> list[str]:
        """Titles of the processes that outlive the driver by `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while (alive := self._alive()) and time.monotonic() < deadline:
            time.sleep(POLL_INTERVAL_S)
        return [f"process {process.pid} {title(process)[:60]}" for process in alive]

    def kill_processes(self) -> None:
        """End what is left, so that it does not disturb the next run."""
        for process in self._alive():
            try:
                process.kill()
            except psutil.Error:
                continue

    def files(self, ignored: Iterable[str] = ()) -> list[str]:
        """Temporary files and the lease in the output directory, and shared memory that no running process maps.

        Other programs have files there too, for moments: what is gone within `END_TIMEOUT_S` is not left behind, nor are
        directories, as servers of MLflow have them.
        """
        left = [*self._out.rglob("*.tmp"), *self._out.glob("lease*"), *self._out.glob(".lease*")]
        deadline = time.monotonic() + END_TIMEOUT_S
        while (shared := self._unused_memory(ignored)) and time.monotonic() < deadline:
            time.sleep(POLL_INTERVAL_S)
        return [str(path) for path in [*left, *shared]]

    def _unused_memory(self, ignored: Iterable[str]) -> list[Path]:
        new = _names(SHARED_MEMORY) - self._shared_before - set(ignored)
        if not new:
            return []
        held = set(_mapped_names())
        return [path for name in new - held if (path := SHARED_MEMORY / name).is_file()]

    def _alive(self) -> list[psutil.Process]:
        alive = [process for process in self._seen.values() if _is_running(process)]
        known = {process.pid for process in alive}
        return alive + [
            process
            for process in _with_token(self._token)
            if process.pid not in known and _is_running(process)
        ]


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _with_token(token: str) -> Iterator[psutil.Process]:
    """Processes whose environment has the token; those that Ray gave a title have lost their environment."""
    needle = f"{TOKEN}={token}".encode()
    for pid in psutil.pids():
        try:
            if needle in Path(f"/proc/{pid}/environ").read_bytes():
                yield psutil.Process(pid)
        except (OSError, psutil.Error):
            continue


def _names(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except OSError:
        return set()


def _mapped_names() -> Iterator[str]:
    """Names below `SHARED_MEMORY` that running processes map or hold open."""
    for pid in psutil.pids():
        try:
            for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
                _, separator, name = line.partition(f"{SHARED_MEMORY}/")
                if separator:
                    yield name.removesuffix(" (deleted)")
            for link in Path(f"/proc/{pid}/fd").iterdir():
                target = os.readlink(link)
                if target.startswith(f"{SHARED_MEMORY}/"):
                    yield target.removeprefix(f"{SHARED_MEMORY}/")
        except OSError:
            continue
