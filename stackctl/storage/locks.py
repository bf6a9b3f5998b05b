"""Locks between processes, which say who holds them.

A lock is the kernel's (flock), on a small file that stays; it is free at once when its holder dies, however that
happens. The holder writes into the file who it is, for those who wait in vain.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from stackctl.core.environment import seconds_setting
from stackctl.core.errors import Failed
from stackctl.storage.atomic import make_directory
from stackctl.storage.paths import cache_root

_TIMEOUT = "STACKCTL_LOCK_TIMEOUT"
_LONGEST_COMMAND = 200


class Holder(msgspec.Struct, frozen=True):
    """Who holds a lock, as they wrote it into its file."""

    pid: int
    host: str
    command: str
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since} ({self.command})"


@contextlib.contextmanager
def locked(path: Path, what: str, timeout: float | None = None) -> Iterator[None]:
    """Hold the one lock at ``path`` while the body runs; ``timeout`` in seconds, else what the environment says.

    Raises:
        Failed: another process held it for the whole time-out; the message names it.
    """
    import filelock

    make_directory(path.parent)
    lock = filelock.UnixFileLock(path, timeout=seconds_setting(_TIMEOUT) if timeout is None else timeout)
    try:
        lock.acquire()
    except filelock.Timeout:
        holder = _read_holder(path)
        raise Failed(
            f"{what} is locked by {holder or 'another stackctl process'} ({path})",
            hint="wait for it to finish and try again"
            + (f" ({_TIMEOUT} sets the seconds to wait)" if timeout is None else ""),
        ) from None
    says_who = type(lock) is filelock.UnixFileLock  # where there is no flock, the file's content is filelock's own
    try:
        if says_who:
            _write(path, _this_process())
        yield
    finally:
        if says_who:
            _write(path, b"")
        lock.release()


@contextlib.contextmanager
def locked_cache(name: str, what: str) -> Iterator[Path]:
    """A folder of the cache, this process's alone while the body runs."""
    folder = cache_root() / name
    with locked(folder / ".lock", what):
        yield folder


def _this_process() -> bytes:
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:_LONGEST_COMMAND]
    command = command.encode(errors="backslashreplace").decode()  # a file's name need not be Unicode
    since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return msgspec.json.encode(Holder(os.getpid(), platform.node(), command, since)) + b"\n"


def _write(path: Path, content: bytes) -> None:
    """In place, for a lock is on the file and not on its name."""
    with contextlib.suppress(OSError):  # a full disk is no reason not to hold a lock
        path.write_bytes(content)


def _read_holder(path: Path) -> Holder | None:
    with contextlib.suppress(OSError, ValueError, msgspec.DecodeError):
        return msgspec.json.decode(path.read_bytes(), type=Holder)
    return None
