"""Other programs that this one has started, and the signals that end either."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def on_signals(handler: Callable[[int, Any], object]) -> Iterator[None]:
    """While the body runs, SIGINT and SIGTERM are the handler's; in another than the main thread they are nobody's."""
    before: dict[signal.Signals, Any] = {}
    with contextlib.suppress(ValueError):  # not in the main thread
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, known in before.items():
            signal.signal(number, known)


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
