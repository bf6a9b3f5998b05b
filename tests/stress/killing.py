"""Run a command in a forked process that kills itself, with SIGKILL, right before its n-th step on the disk.

The steps are counted by Python's audit hook (open, rename, mkdir, remove, ...) and at ``os.fsync``: whatever a kill
could leave half done lies between two of them. Nothing in the product knows of it.
"""

from __future__ import annotations

import mmap
import os
import signal
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

_STEPS = ("open", "os.", "shutil.", "fcntl.")


@dataclass(frozen=True)
class Ended:
    """How it ended: the exit code (None when it was killed), the steps that it made, and what it said."""

    code: int | None
    steps: int
    said: str


def run_command(
    arguments: list[str],
    folder: Path,
    kill_before: int | None = None,
    prepare: Callable[[Path], None] = lambda _: None,
) -> Ended:
    """Run ``stackctl ARGUMENTS`` in ``folder``; with ``kill_before`` only up to that step, counted from one.

    ``prepare`` is called with the folder in the process that will be the command.
    """
    log = folder.parent / f"{folder.name}.log"
    counter = mmap.mmap(-1, 8)
    child = os.fork()
    if not child:
        _be_the_command(arguments, folder, kill_before, prepare, log, counter)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    steps = struct.unpack("q", counter)[0]
    return Ended(None if status == -signal.SIGKILL else status, steps, log.read_text(errors="replace"))


def _be_the_command(
    arguments: list[str],
    folder: Path,
    kill_before: int | None,
    prepare: Callable[[Path], None],
    log: Path,
    counter: mmap.mmap,
) -> NoReturn:
    code = 99
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
        os.chdir(folder)
        os.environ["STACKCTL_CACHE"] = str(folder / "cache")
        from stackctl.cli import main

        sys.argv = ["stackctl", *arguments]
        _arm(str(folder), kill_before, counter)
        prepare(folder)
        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _arm(folder: str, kill_before: int | None, counter: mmap.mmap) -> None:
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1
        if steps == kill_before:
            os.kill(os.getpid(), signal.SIGKILL)
        counter[:] = struct.pack("q", steps)

    def hook(event: str, arguments: Any) -> None:
        if event.startswith(_STEPS) and any(str(a).startswith(folder) for a in arguments if isinstance(a, str | Path)):
            step()

    fsync = os.fsync

    def counted(descriptor: int) -> None:
        step()
        fsync(descriptor)

    os.fsync = counted
    sys.addaudithook(hook)
