"""One record as the model sees it, with what is learned of it marked: in colour on a terminal, else in brackets."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Sequence

Part = tuple[str, bool]
"""Some text, and whether it is learned."""

_OPEN, _CLOSE = "⟦", "⟧"
_GREEN, _DIM, _PLAIN = "\033[32m", "\033[2m", "\033[0m"
_HEAD, _TAIL, _PARTS = 160, 80, 12
"""Characters of a part that are shown from its beginning and from its end, and how many parts are shown."""


def render_preview(parts: Sequence[Part], *, colours: bool) -> str:
    """Lines with a bar before each; long parts are shown from both ends, and of many parts the first ones.

    Control characters other than a newline are shown by their names, so that data cannot steer a terminal.
    """
    pieces = []
    for text, learned in itertools.islice(parts, _PARTS):
        shown = _visible(text if len(text) <= _HEAD + _TAIL else f"{text[:_HEAD]} … {text[-_TAIL:]}")
        if not colours:
            pieces.append(f"{_OPEN}{shown}{_CLOSE}" if learned else shown)
        else:  # line by line: a bar stands before each
            style = _GREEN if learned else _DIM
            pieces.append("\n".join(f"{style}{line}{_PLAIN}" if line else "" for line in shown.split("\n")))
    if len(parts) > _PARTS:
        pieces.append(" …")
    return "\n".join(f"  │ {line}".rstrip() for line in "".join(pieces).split("\n"))


def _visible(text: str) -> str:
    return "".join(
        sign if sign == "\n" or sign.isprintable() or unicodedata.category(sign) == "Zs" else repr(sign)[1:-1]
        for sign in text
    )
