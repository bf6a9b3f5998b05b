"""One record as the model sees it, with what is learned of it marked: in colour on a terminal, else in brackets."""

from __future__ import annotations

import io
import itertools
import unicodedata
from collections.abc import Sequence

Span = tuple[str, bool]
"""Some text, and whether it is learned."""

_OPEN, _CLOSE, _BAR = "⟦", "⟧", "  │ "
_HEAD, _TAIL, _PARTS = 160, 80, 12
"""Characters of a part that are shown from its beginning and from its end, and how many parts are shown."""


def render_preview(parts: Sequence[Span], *, colours: bool, width: int | None = None) -> str:
    """Lines with a bar before each; long parts are shown from both ends, and of many parts the first ones.

    Lines are broken between words to fit ``width`` columns. Control characters other than a newline are shown by their
    names, so that data cannot steer a terminal.
    """
    from rich.console import Console
    from rich.text import Text

    told = Text()
    for text, learned in itertools.islice(parts, _PARTS):
        shown = _visible(text if len(text) <= _HEAD + _TAIL else f"{text[:_HEAD]} … {text[-_TAIL:]}")
        told.append(f"{_OPEN}{shown}{_CLOSE}" if learned and not colours else shown, "green" if learned else "dim")
    if len(parts) > _PARTS:
        told.append(" …", "dim")
    console = Console(file=io.StringIO(), color_system="standard" if colours else None, no_color=False, highlight=False)
    lines = told.wrap(console, width - len(_BAR)) if width else told.split("\n", allow_blank=True)
    rows = []
    for line in lines:
        line.rstrip()
        with console.capture() as row:
            console.print(line, end="", soft_wrap=True)
        rows.append(f"{_BAR}{row.get()}".rstrip())
    return "\n".join(rows)


def _visible(text: str) -> str:
    return "".join(
        sign if sign == "\n" or sign.isprintable() or unicodedata.category(sign) == "Zs" else repr(sign)[1:-1]
        for sign in text
    )
