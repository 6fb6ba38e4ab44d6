"""What a run was made from: code revision, package versions, machine, data, as plain records.

Nothing here fails: what is unknown is None, because a record must never stop a training.

`torch.utils.collect_env` is not used: it takes 3.7 s of CPU time where `collect` takes 0.2 s (pip, lscpu, gcc, CMake in
processes of their own), asks torch for CUDA in the driver, and adds compilers, cuDNN and CPU flags. It lacks the revision
of the code, memory and CPUs as the container limits them, and the versions of timm, Ray, MLflow, scikit-learn, PyArrow and
Pillow.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from bim.orchestrator.text import printable, redact

PACKAGES = ("torch", "torchvision", "timm", "ray", "mlflow", "numpy", "scikit-learn", "pyarrow", "pillow")
"""Distributions whose version can change a number or a file of ours."""

CODE_FOLDERS = ("models", "orchestrator", "pipelines")
"""Only a change in these changes what a run does; a stray file elsewhere does not make a run dirty."""


@dataclass(frozen=True)
class CodeState:
    """The revision that ran. `commit` is None when the code does not come from a git checkout."""

    commit: str | None
    dirty: bool | None
    """True if tracked files of the packages differ from the commit, or untracked ones lie among them."""


@dataclass(frozen=True)
class Hardware:
    """CPUs, memory and GPUs of a machine."""

    cpu: str
    cpus: int
    """CPUs that this process may use, not those that the machine has."""
    memory_gib: float | None
    """Smaller of the machine's memory and the container's limit."""
    gpus: tuple[str, ...]

    def __str__(self) -> str:
        memory = "" if self.memory_gib is None else f", {self.memory_gib:.0f} GiB"
        return f"{self.cpus} x {self.cpu}{memory}, {', '.join(self.gpus) or 'no GPU'}"


@dataclass(frozen=True)
class Machine:
    """Where a process runs, and the versions there."""

    host: str
    hardware: Hardware
    python: str
    packages: dict[str, str]
    cuda: str | None = None
    """The version of CUDA that torch was built for; None without CUDA."""
    visible_gpus: str | None = None
    """`CUDA_VISIBLE_DEVICES` of the process, which Ray sets; None: all GPUs."""


@dataclass(frozen=True)
class DataRecord:
    """The images of a run: where from, a fingerprint of the content, and how many went into each split."""

    source: str
    fingerprint: str
    images: int
    train: int
    val: int
    test: int
    classes: int | None = None


@dataclass(frozen=True)
class Provenance:
    """All of it. `as_dict` is what goes to provenance.json."""

    code: CodeState
    packages: dict[str, str]
    python: str
    system: str
    hardware: Hardware
    command: tuple[str, ...]
    data: DataRecord | None = None
    extra: dict[str, str] = field(default_factory=dict)
    """Facts of the caller, e.g. the resources of the cluster."""
    stages: tuple[Machine, ...] = ()
    """The machine of every stage, once they are known; `hardware` is that of the driver."""

    @property
    def hardware_text(self) -> str:
        """The hardware that trains, each kind of machine once: `4 machines of 8 x Xeon, 31 GiB, NVIDIA L4`."""
        hosts: dict[str, set[str]] = {}
        for stage in self.stages:
            hosts.setdefault(str(stage.hardware), set()).add(stage.host)
        if not hosts:
            return str(self.hardware)
        return "; ".join(
            f"{len(names)} machines of {text}" if len(names) > 1 else text for text, names in hosts.items()
        )

    def as_dict(self) -> dict[str, object]:
        return dataclasses.asdict(self)


def collect(data: DataRecord | None = None, extra: dict[str, str] | None = None) -> Provenance:
    """The record of this process, now. Takes some tens of milliseconds (it runs git and nvidia-smi)."""
    return Provenance(
        code=code_state(Path(__file__).resolve().parents[2]),
        packages=package_versions(PACKAGES),
        python=platform.python_version(),
        system=platform.platform(),
        hardware=hardware(),
        command=tuple(printable(redact(argument)) for argument in sys.argv),
        data=data,
        extra=dict(extra or {}),
    )


def code_state(root: Path) -> CodeState:
    """Commit and dirtiness of the checkout at `root`.

    An installed copy may lie inside another project's checkout (in its `.venv`), whose revision is not that of the
    code; so the answer counts only if the package is tracked there.
    """
    if _output_of("git", "-C", str(root), "ls-files", "--error-unmatch", "orchestrator/__init__.py") is None:
        return CodeState(None, None)
    commit = _output_of("git", "-C", str(root), "rev-parse", "HEAD")
    changes = _output_of("git", "-C", str(root), "status", "--porcelain", "--", *CODE_FOLDERS)
    return CodeState(commit, None if changes is None else bool(changes))


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Installed version per distribution; what is not installed is left out."""
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def machine() -> Machine:
    """The machine of this process; the stages call it. Does not import torch where it is not imported."""
    torch = sys.modules.get("torch")
    cuda = None if torch is None else torch.version.cuda
    versions = package_versions(("torch", "torchvision", "timm", "ray", "numpy"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return Machine(platform.node(), hardware(), platform.python_version(), versions, cuda, visible)


def hardware() -> Hardware:
    """CPU, memory and GPUs of this machine, these by nvidia-smi: torch would open CUDA in the driver."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    gpus = _output_of("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
    return Hardware(_cpu_name(), cpus, _memory_gib(), tuple((gpus or "").splitlines()))


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    limits = []
    with contextlib.suppress(ValueError, OSError, AttributeError):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with contextlib.suppress(ValueError, OSError):  # the file may say "max": no limit
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")))
    return round(min(limits) / 2**30, 1) if limits else None


def _output_of(program: str, *arguments: str) -> str | None:
    """What a short command printed, stripped; None if it is missing, fails or takes over five seconds."""
    if shutil.which(program) is None:
        return None
    try:
        process = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=5, check=True)
    except (subprocess.SubprocessError, OSError):
        return None
    return process.stdout.strip()
