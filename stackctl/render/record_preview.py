"""One record as the model sees it, with what is learned of it marked: in colour on a terminal, else in brackets."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

Span = tuple[str, bool]
"""Some text, and whether it is learned."""

_Sign = tuple[str, bool]
_OPEN, _CLOSE, _BAR = "⟦", "⟧", "  │ "
_GREEN, _DIM, _RESET = "\033[32m", "\033[2m", "\033[0m"
_HEAD, _TAIL, _PARTS = 160, 80, 12
"""Characters of a part that are shown from its beginning and from its end, and how many parts are shown."""


def render_preview(parts: Sequence[Span], *, colours: bool, width: int | None = None) -> str:
    """Lines with a bar before each; long parts are shown from both ends, and of many parts the first ones.

    Lines are broken between words to fit ``width`` columns. Control characters other than a newline are shown by their
    names, so that data cannot steer a terminal.
    """
    signs: list[_Sign] = []
    for text, learned in itertools.islice(parts, _PARTS):
        shown = _visible(text if len(text) <= _HEAD + _TAIL else f"{text[:_HEAD]} … {text[-_TAIL:]}")
        signs += [(sign, learned) for sign in (f"{_OPEN}{shown}{_CLOSE}" if learned and not colours else shown)]
    if len(parts) > _PARTS:
        signs += [(sign, False) for sign in " …"]
    rows = [row for line in _lines(signs) for row in _fit(line, width - len(_BAR) if width else None)]
    return "\n".join(f"{_BAR}{_painted(row) if colours else _plain(row)}".rstrip() for row in rows)


def _lines(signs: list[_Sign]) -> Iterator[list[_Sign]]:
    start = 0
    for place, (sign, _) in enumerate(signs):
        if sign == "\n":
            yield signs[start:place]
            start = place + 1
    yield signs[start:]


def _fit(line: list[_Sign], width: int | None) -> Iterator[list[_Sign]]:
    """A line in pieces of at most ``width`` columns, which end where a word does if one does."""
    start = columns = 0
    space = -1
    for place, (sign, _) in enumerate(line):
        columns += _columns(sign)
        if width and columns > width and place > start:
            cut = place if sign == " " or space <= start else space
            yield line[start:cut]
            start = cut + (line[cut][0] == " ")
            columns = sum(_columns(taken) for taken, _ in line[start : place + 1])
        if sign == " ":
            space = place
    yield line[start:]


def _columns(sign: str) -> int:
    return 2 if unicodedata.east_asian_width(sign) in "WF" else 1


def _painted(row: list[_Sign]) -> str:
    """Green what is learned, dim what is not; closed on each line, for a bar stands before the next."""
    runs = itertools.groupby(row, key=lambda sign: sign[1])
    return "".join(f"{_GREEN if learned else _DIM}{_plain(run)}{_RESET}" for learned, run in runs)


def _plain(row: Iterable[_Sign]) -> str:
    return "".join(sign for sign, _ in row)


def _visible(text: str) -> str:
    return "".join(
        sign if sign == "\n" or sign.isprintable() or unicodedata.category(sign) == "Zs" else repr(sign)[1:-1]
        for sign in text
    )
