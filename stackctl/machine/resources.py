"""What this machine has for the work: processors, memory, disks, installed packages. No tensor library is loaded."""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

DISTRIBUTION = "stackctl-lora"


@dataclass(frozen=True)
class Memory:
    """Bytes of main memory that this process may use: in all, and free at this moment."""

    total: int
    available: int


def allowed_cores() -> list[int]:
    """The numbers of the processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cores() -> int:
    """How many processors' time this process may use: a container's share of them counts, rounded up."""
    share = _text(_CPU_SHARE).split()  # microseconds of each period, or max; and the period
    limit = math.ceil(int(share[0]) / int(share[1])) if len(share) == 2 and share[0].isdigit() else None
    return max(1, min(len(allowed_cores()), limit or len(allowed_cores())))


_CPU_SHARE = Path("/sys/fs/cgroup/cpu.max")


def main_memory() -> Memory:
    """Main memory, no more than what a container's limit leaves of it."""
    import psutil  # type: ignore[import-untyped]

    found = psutil.virtual_memory()
    total, available = int(found.total), int(found.available)
    for limit_file, used_file in _CGROUP:
        limit, used = _number(limit_file), _number(used_file)
        if limit is not None and limit < total:
            total, available = limit, min(available, limit - (used or 0))
    return Memory(total, max(available, 0))


_CGROUP = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)
"""The limit and the use of a container's control group, in version 2 and in version 1."""


def _number(file: Path) -> int | None:
    """The number that a file holds; None when it is not there or says ``max``."""
    text = _text(file)
    return int(text) if text.isdigit() else None


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def disk_free(path: Path) -> int:
    """Free bytes where ``path`` is, or would be made."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def system() -> str:
    return f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"


def installed(package: str) -> str | None:
    """A package's version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def packages() -> tuple[dict[str, str | None], list[str]]:
    """The packages that stackctl needs with the versions that are here, and what of them is missing or too old.

    Read from the distribution's own metadata, so that the list stands in one place, ``pyproject.toml``.
    """
    from packaging.requirements import Requirement

    found: dict[str, str | None] = {}
    wrong: list[str] = []
    for text in importlib.metadata.requires(DISTRIBUTION) or ():
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = found[requirement.name] = installed(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement} is needed, and " + (f"{version} is installed" if version else "is missing"))
    return found, wrong


def return_freed_memory() -> None:
    """Give what this process has freed back to the system, where its C library keeps it (glibc) and can be told."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
