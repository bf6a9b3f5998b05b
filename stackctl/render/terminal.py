"""Text as a terminal shows it: labels in their colours, lines broken between words, nothing that steers it.

What is longer than the screen goes through the user's pager, as git's does.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterable
from typing import TextIO

from stackctl.machine.processes import on_signals

_USUAL_WIDTH = 80
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_COLOURS = ("black", "red", "green", "yellow", "blue", "magenta", "cyan")
"""As terminals number them."""
LABELS = {"error": "red", "warning": "yellow", "note": "yellow", "hint": "cyan"}
"""The words that begin what is more than a report, and their colours."""


def printable(text: str) -> str:
    """Text that may be other people's, fit to be shown: what would speak to the terminal is written as an escape."""
    return _CONTROL.sub(lambda sign: ascii(sign[0])[1:-1], text)


def counted(number: int, one: str, several: str = "") -> str:
    """A number of things: ``1 entry``, ``2 entries``; ``several`` is ``one`` with an s where it is left out."""
    return f"{number} {one if number == 1 else several or f'{one}s'}"


class Painted(str):
    """Text with colours of our own; what is not ours in it was made fit to be shown already."""


def colours_on(stream: TextIO) -> bool:
    """Whether text may be coloured: on a terminal that can, and not where NO_COLOR forbids it."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and stream.isatty()


def width_of(stream: TextIO) -> int | None:
    """The columns of a terminal; None where there is none, and lines may be as long as they are."""
    if not stream.isatty():
        return None
    with contextlib.suppress(ValueError, OSError):
        return int(os.environ.get("COLUMNS") or 0) or os.get_terminal_size(stream.fileno()).columns or _USUAL_WIDTH
    return _USUAL_WIDTH


def laid_out(text: str, stream: TextIO) -> str:
    """Lines as a person reads them: labels in their colours, broken between words where the terminal ends.

    A line that holds a command stays whole, so that it can be copied.
    """
    width, lines = width_of(stream), []
    for line in text.split("\n"):
        if width and len(line) > width and "stackctl " not in line:
            indent = line[: len(line) - len(line.lstrip())]
            lines += textwrap.wrap(
                line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
            )
        else:
            lines.append(line)
    return "\n".join(_labelled(line, stream) for line in lines)


def _labelled(line: str, stream: TextIO) -> str:
    label, colon, rest = line.partition(":")
    if not colon or label not in LABELS:
        return line
    return styled(f"{label}:", f"1;{30 + _COLOURS.index(LABELS[label])}", stream) + rest


def styled(text: str, code: str, stream: TextIO) -> str:
    """Text with a terminal's code for a colour or for bold, where ``stream`` may have one."""
    return f"\033[{code}m{text}\033[0m" if colours_on(stream) else text


def shortened(text: str, most: int) -> str:
    """A text of at most so many characters."""
    return text if len(text) <= most else text[: max(most - 1, 0)] + "…"


def signed(value: float, digits: int) -> str:
    """A number with its sign, which nothing that rounds to zero has."""
    text = f"{value:+.{digits}f}"
    return text if float(text) else text[1:]


_PAGERS = ("STACKCTL_PAGER", "PAGER")
_MANNERS = {"LESS": "FRX", "LV": "-c"}
"""For pagers that nobody has set otherwise: colours are colours, and what was read stays to be seen."""


def show_paged(pieces: Iterable[str], height: int) -> None:
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
        with on_signals(signal.SIG_IGN, [signal.SIGINT]):  # Ctrl-C is the pager's as long as it runs
            with contextlib.suppress(BrokenPipeError):  # who has seen enough leaves
                for piece in pieces:
                    process.stdin.write(piece.encode(encoding, errors="replace"))
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.wait()
