"""Text as a terminal shows it: labels in their colours, lines broken between words, nothing that steers it."""

from __future__ import annotations

import contextlib
import os
import re
import textwrap
from typing import TextIO

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
