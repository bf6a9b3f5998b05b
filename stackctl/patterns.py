"""Regular expressions of other people's, matched in bounded time.

PEFT's ``target_modules`` and its patterns are regular expressions, and a checkpoint from anywhere may hold one that
backtracks for years (``(a+)+$``). ``re`` cannot be stopped; the package ``regex``, which reads the same language, can.
It is imported only for expressions that repeat something, since no other can take long.
"""

from __future__ import annotations

import functools
import re
import time
from typing import Any

from stackctl.errors import Incompatible

_SECONDS = 2.0
"""How long all matches of one expression may take together; an honest one takes microseconds."""
_REPEATS = re.compile(r"[*+?{]")


class Pattern:
    """One expression; :func:`pattern` keeps it, with the time that it has taken so far."""

    def __init__(self, text: str, given: str) -> None:
        self._text, self._given = text, given
        self._left = _SECONDS
        self._compiled: Any = None
        if _REPEATS.search(given):
            import regex  # type: ignore[import-untyped]

            self._compiled = regex.compile(text, regex.VERSION0)

    def fullmatch(self, name: str) -> bool:
        return self._match("fullmatch", name) is not None

    def match(self, name: str) -> Any:
        """The match at the start of ``name``, or None."""
        return self._match("match", name)

    def _match(self, how: str, name: str) -> Any:
        if self._compiled is None:
            return getattr(re, how)(self._text, name)
        started = time.perf_counter()
        try:
            return getattr(self._compiled, how)(name, timeout=max(self._left, 1e-3))
        except TimeoutError:
            raise Incompatible(
                f"the regular expression '{self._given[:80]}' takes for ever to match",
                hint="list the modules by name in target_modules, or simplify the expression",
            ) from None
        finally:
            self._left -= time.perf_counter() - started


@functools.lru_cache(maxsize=4096)
def pattern(text: str, given: str | None = None) -> Pattern:
    """The expression ``text``, compiled once; ``given`` is the part of it that came from elsewhere (all, if left out).

    Raises:
        re.error: it is none. Its matches raise Incompatible when they take too long.
    """
    re.compile(text)  # what PEFT itself would refuse is refused, whatever more the other package reads
    return Pattern(text, text if given is None else given)
