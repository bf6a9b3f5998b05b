"""The signals that end a command: they end it as an exception does, so that what it was making is removed."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from stackctl.jobs.ranks import is_launched

_LATER = 0.05
"""Seconds after which a signal that came while torch was imported is looked at again."""


class TerminatedBySignal(BaseException):
    """SIGTERM came. Nothing that goes on after an error, or after Ctrl-C, goes on after this."""


@contextlib.contextmanager
def ending_signals() -> Iterator[None]:
    """While the body runs, Ctrl-C and SIGTERM raise there; one that is ignored, or somebody else's, stays so.

    Raises:
        KeyboardInterrupt, TerminatedBySignal: one came.
    """
    kinds = {
        signal.SIGINT: (signal.default_int_handler, KeyboardInterrupt),
        signal.SIGTERM: (signal.SIG_DFL, TerminatedBySignal),
    }
    if is_launched():  # it ends a process that waits for another in torch, where nothing can be raised
        del kinds[signal.SIGTERM]
    taken = []
    with contextlib.suppress(ValueError):  # not in the main thread
        for number, (usual, kind) in kinds.items():
            if signal.getsignal(number) == usual:
                signal.signal(number, _raising(kind))
                taken.append((number, usual))
    try:
        yield
    finally:
        for number, usual in taken:
            signal.signal(number, usual)


def _raising(kind: type[BaseException]) -> Callable[[int, FrameType | None], None]:
    def handle(number: int, _: FrameType | None) -> None:
        if not _is_importing_torch():
            raise kind
        again = threading.Timer(_LATER, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()

    return handle


def _is_importing_torch() -> bool:
    """Whether torch is being imported now, whose own code aborts the process when an exception comes back to it."""
    spec = getattr(sys.modules.get("torch"), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


def keep_exit_code() -> None:
    """End with the exit code that was told: ``python -m`` kills itself by SIGINT instead, where Ctrl-C once came out of
    code that a library had Python run, whatever became of it.
    """
    atexit.register(signal.pthread_sigmask, signal.SIG_BLOCK, {signal.SIGINT})
