"""What is longer than the screen goes through the user's pager, as git's does."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable

_PAGERS = ("STACKCTL_PAGER", "PAGER")
_MANNERS = {"LESS": "FRX", "LV": "-c"}
"""For pagers that nobody has set otherwise: colours are colours, and what was read stays to be seen."""


def show(pieces: Iterable[str], height: int) -> None:
    """Print text on stdout; through a pager if that is a terminal and the text has ``height`` lines or more.

    The text is asked for piece by piece, as far as somebody reads it.
    """
    pager = _pager() if sys.stdout.isatty() else None
    if pager:
        pieces, first, lines = iter(pieces), [], 0
        for piece in pieces:
            first.append(piece)
            lines += piece.count("\n")
            if lines >= height:
                _page(pager, itertools.chain(first, pieces))
                return
        pieces = first
    for piece in pieces:
        sys.stdout.write(piece)
    sys.stdout.flush()


def _pager() -> str | None:
    """The command of the pager to use; None where there is none, or none is wanted."""
    if os.environ.get("TERM") == "dumb":
        return None
    for name in _PAGERS:
        if name in os.environ:
            program = next(iter(os.environ[name].split()), "cat")
            return os.environ[name] if program != "cat" and shutil.which(program) else None
    return next((name for name in ("less", "more") if shutil.which(name)), None)


def _page(pager: str, pieces: Iterable[str]) -> None:
    encoding = sys.stdout.encoding
    with subprocess.Popen(pager, shell=True, stdin=subprocess.PIPE, env={**_MANNERS, **os.environ}) as process:
        assert process.stdin
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the pager's as long as it runs
        try:
            with contextlib.suppress(BrokenPipeError):  # who has seen enough leaves
                for piece in pieces:
                    process.stdin.write(piece.encode(encoding, errors="replace"))
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.wait()
        finally:
            signal.signal(signal.SIGINT, before)
