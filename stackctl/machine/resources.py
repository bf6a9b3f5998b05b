"""What this machine has for the work: processors, memory, disks, installed packages. No tensor library is loaded."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import math
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ctypes import CDLL

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


def physical_cores() -> int:
    """How many cores this machine has, those that run two threads counted once."""
    import psutil  # type: ignore[import-untyped]

    return psutil.cpu_count(logical=False) or os.cpu_count() or 1


_CPU_SHARE = Path("/sys/fs/cgroup/cpu.max")


def main_memory() -> Memory:
    """Main memory, no more than what the limits of this process's control groups leave of it.

    What a group holds of files counts as free, as it does in the machine's own figure.
    """
    import psutil  # type: ignore[import-untyped]

    found = psutil.virtual_memory()
    total, available = int(found.total), int(found.available)
    for limit_file, used_file in _limits():
        limit, used = _number(limit_file), _number(used_file)
        if limit is not None and limit < found.total:
            total = min(total, limit)
            available = min(available, limit - (used or 0) + _of_files(used_file.with_name("memory.stat")))
    return Memory(total, max(min(available, total), 0))


def own_memory() -> int:
    """Bytes of main memory that are this process's alone: without mapped files, which can be dropped and read again."""
    import psutil

    found = psutil.Process().memory_info()
    return int(found.rss - getattr(found, "shared", 0))


_CGROUP = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)
"""The limit and the use of the outermost control group that is seen, in version 2 and in version 1."""
_OWN_GROUPS = Path("/proc/self/cgroup")
"""This process's groups below those: a line ``number:controllers:/path`` for each hierarchy."""
_M_MMAP_THRESHOLD = -3  # in glibc's malloc.h
_M_ARENA_MAX = -8


def _limits() -> Iterator[tuple[Path, Path]]:
    """The files of every control group that holds this process, from the outermost inwards."""
    own = [line.split(":", 2) for line in _text(_OWN_GROUPS).splitlines() if line.count(":") > 1]
    for limit, used in _CGROUP:
        yield limit, used
        named = "memory" if "limit_in_bytes" in limit.name else ""
        for _, controllers, path in own:
            if named in controllers.split(","):
                folder = Path()
                for part in Path(path).parts[1:]:
                    folder /= part
                    yield limit.parent / folder / limit.name, used.parent / folder / used.name


def _of_files(stat: Path) -> int:
    """Bytes of files in a control group's memory, of its children too; none where it does not say."""
    found = dict(line.split(maxsplit=1) for line in _text(stat).splitlines() if " " in line)
    values = [found.get(f"total_{kind}", found.get(kind, "")) for kind in ("active_file", "inactive_file")]
    return sum(int(value) for value in values if value.isdigit())


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


@functools.cache
def c_library() -> CDLL:
    """The C library that this process runs on; Windows has none by that name (``TypeError``)."""
    import ctypes

    return ctypes.CDLL(None)


def return_freed_memory() -> None:
    """Give what this process has freed back to the system, where its C library keeps it (glibc) and can be told."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        c_library().malloc_trim(0)


def one_heap() -> None:
    """Let threads that are begun from now on take memory from the process's one heap, by glibc.

    It otherwise gives each thread heaps of 64 MB, which are given back and asked for anew in every step.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        c_library().mallopt(_M_ARENA_MAX, 1)


def map_blocks(smallest: int) -> None:
    """From now on blocks of so many bytes and more are given back to the system as soon as they are free, by glibc.

    It otherwise learns to keep blocks of up to 32 MB in its heap, where those that stay for long cut up what is free.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        c_library().mallopt(_M_MMAP_THRESHOLD, smallest)
