"""Other programs that this one has started, and the signals that end either."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

_BOUND = """
import ctypes, os, sys
starter, number, *line = sys.argv[1:]
ctypes.CDLL(None).prctl(1, int(number))  # PR_SET_PDEATHSIG, which the program keeps
if os.getppid() == int(starter):
    os.execv(line[0], line)
"""
"""Run by another Python, since what runs between fork and exec could wait for a lock of this process's threads."""


@contextlib.contextmanager
def on_signals(
    handler: Callable[[int, Any], object] | signal.Handlers,
    numbers: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM),
) -> Iterator[None]:
    """While the body runs, signals are the handler's; in another than the main thread they are nobody's."""
    before: dict[signal.Signals, Any] = {}
    with contextlib.suppress(ValueError):  # not in the main thread
        for number in numbers:
            before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, known in before.items():
            if known is not None:  # else it was not Python's
                signal.signal(number, known)


def bound(line: Sequence[str], number: signal.Signals = signal.SIGKILL) -> list[str]:
    """The words that start a program which gets a signal when who starts it ends, however that is; on Linux.

    That is the thread that starts it, which therefore has to live as long as the program is wanted.
    """
    if sys.platform != "linux":
        return list(line)
    return [sys.executable, "-I", "-S", "-c", _BOUND, str(os.getpid()), str(int(number)), *line]


def end(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Ask a program to end, and kill it when it has not within some seconds."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
