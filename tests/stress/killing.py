"""Run a command in a forked process that kills itself, with SIGKILL, right before its n-th step on the disk.

The steps are counted by Python's audit hook (open, rename, mkdir, remove, ...) and at ``os.fsync``: whatever a kill
could leave half done lies between two of them. Nothing in the product knows of it.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import multiprocessing
import os
import pkgutil
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import warm

from stackctl.cli import built_app

_LIGHT = ("core", "storage", "lora", "plan", "registry", "render", "machine", "jobs", "cli")
_STEPS = ("open", "os.", "shutil.", "fcntl.")


@dataclass(frozen=True)
class Kill:
    """Right before the ``number``-th step on the disk, counted from one, of those on a path that ``place`` matches."""

    number: int
    place: str = ""


@dataclass(frozen=True)
class Ended:
    """How it ended: the exit code (None when it was killed), the path of each step that it made, and what it said."""

    code: int | None
    steps: tuple[str, ...]
    said: str


def run_command(
    arguments: list[str],
    folder: Path,
    kill: Kill | None = None,
    prepare: Callable[[Path], None] | None = None,
) -> Ended:
    """Run ``stackctl ARGUMENTS`` in ``folder``, up to the kill if there is to be one.

    ``prepare`` is called with the folder in the process that will be the command.
    """
    built_app(arguments[0])  # here, instead of in each process
    child = os.fork()
    if not child:
        _be_the_command(arguments, folder, kill, prepare)
    return _ended(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), folder)


def run_light(
    arguments: list[str],
    folder: Path,
    kill: Kill | None = None,
    prepare: Callable[[Path], None] | None = None,
) -> Ended:
    """The same of a command that needs neither tensors nor the Hub: forked off a process that never had them.

    A fork off one that is a gigabyte large takes three times as long as such a command. ``prepare`` can be pickled.
    """
    server = _light_server()
    server.send((arguments, folder, kill, prepare, dict(os.environ)))
    return _ended(server.recv(), folder)


@functools.cache
def _light_server() -> Connection:
    here, there = multiprocessing.Pipe()
    multiprocessing.get_context("spawn").Process(target=_fork_each, args=(there,), daemon=True).start()
    there.close()
    return here


def _fork_each(asked: Connection) -> None:
    """Fork off each command that is asked for, and answer with how it ended. What is light is imported once, here."""
    for room in _LIGHT:
        for module in pkgutil.iter_modules(importlib.import_module(f"stackctl.{room}").__path__):
            importlib.import_module(f"stackctl.{room}.{module.name}")
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            arguments, folder, kill, prepare, environment = asked.recv()
            built_app(arguments[0])
            child = os.fork()
            if not child:
                os.environ.clear()
                os.environ.update(environment)
                os.fsync = lambda _: None  # what was written outlives a killed process
                _be_the_command(arguments, folder, kill, prepare)
            asked.send(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def run_engine(arguments: list[str], folder: Path, kill: Kill | float | None = None) -> Ended:
    """The same for a command of the engine, in one thread; a number kills it after so many seconds.

    It is forked off a process in which torch has never worked: one in which it has is no good for that any more.
    """
    child = warm.SERVER.Process(
        target=_be_the_command, args=(arguments, folder, kill if isinstance(kill, Kill) else None, _one_thread)
    )
    child.start()
    child.join(kill if isinstance(kill, float) else None)
    child.kill()
    child.join()
    assert child.exitcode is not None
    return _ended(child.exitcode, folder)


def _one_thread(_: Path) -> None:
    import torch

    torch.set_num_threads(1)


def _ended(status: int, folder: Path) -> Ended:
    said, steps = (path.read_text(errors="replace") for path in _journals(folder))
    return Ended(None if status == -signal.SIGKILL else status, tuple(steps.splitlines()), said)


def _journals(folder: Path) -> tuple[Path, Path]:
    """The files of what a command in ``folder`` says, and of its steps."""
    return folder.parent / f"{folder.name}.log", folder.parent / f"{folder.name}.steps"


def _be_the_command(
    arguments: list[str], folder: Path, kill: Kill | None, prepare: Callable[[Path], None] | None
) -> NoReturn:
    gc.disable()  # it would write on every page that it shares with its parent
    try:
        said, steps = (os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for path in _journals(folder))
        warm.redirect(said, said)
        os.chdir(folder)
        os.environ["STACKCTL_CACHE"] = str(folder / "cache")
        _arm(str(folder), kill, steps)
        if prepare:
            prepare(folder)
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(99)
    warm.run_and_exit(arguments)


def _arm(folder: str, kill: Kill | None, journal: int) -> None:
    """Write each step's path into ``journal``, and die before one of them. A flush belongs to the path before it."""
    left = kill.number if kill else 0
    last = ""

    def step(path: str) -> None:
        nonlocal left, last
        last = path
        if kill and re.search(kill.place, path):
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
        os.write(journal, f"{path!r}\n".encode())

    def hook(event: str, arguments: Any) -> None:
        if event.startswith(_STEPS):
            path = next((str(a) for a in arguments if isinstance(a, str | Path) and str(a).startswith(folder)), None)
            if path is not None:
                step(path)

    fsync = os.fsync

    def counted(descriptor: int) -> None:
        step(last)
        fsync(descriptor)

    os.fsync = counted
    sys.addaudithook(hook)
