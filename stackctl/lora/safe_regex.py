"""Regular expressions of other people's, matched in bounded time.

PEFT's ``target_modules`` and its patterns are regular expressions, and a checkpoint from anywhere may hold one that
backtracks for years (``(a+)+$``). ``re`` looks for signals while it matches, so a timer of the processor's time can
end it. (The package ``regex`` has a time-out for matches, but none for compiling, which ``((a{1000}){1000}){1000}``
makes eat all memory.)
"""

from __future__ import annotations

import contextlib
import functools
import re
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

from stackctl.core.errors import Incompatible

_SECONDS = 2.0
"""Of the processor's time, for all matches of one expression together; an honest one takes microseconds."""
_REPEATS = re.compile(r"[*+?{]")


class _Endless(Exception):
    """The timer has run out."""


class Pattern:
    """One expression; :func:`pattern` keeps it, with the time that it has taken so far."""

    def __init__(self, text: str, given: str) -> None:
        self._given = given
        self._left = _SECONDS
        self._repeats = _REPEATS.search(given) is not None  # no other expression can take long
        self._compiled = re.compile(text)

    def fullmatch(self, name: str) -> bool:
        with self._bounded():
            return self._compiled.fullmatch(name) is not None

    def match(self, name: str) -> re.Match[str] | None:
        """The match at the start of ``name``, or None."""
        with self._bounded():
            return self._compiled.match(name)

    @contextlib.contextmanager
    def _bounded(self) -> Iterator[None]:
        """Only the main thread can have signals, and only POSIX has this timer; elsewhere nothing is bounded."""
        in_main = threading.current_thread() is threading.main_thread()
        if not (self._repeats and in_main and hasattr(signal, "setitimer")):
            yield
            return
        before = signal.signal(signal.SIGVTALRM, _stop)
        started = time.process_time()
        signal.setitimer(signal.ITIMER_VIRTUAL, max(self._left, 1e-3))
        try:
            yield
        except _Endless:
            raise Incompatible(
                f"the regular expression '{self._given[:80]}' takes for ever to match",
                hint="list the modules by name in target_modules, or simplify the expression",
            ) from None
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)
            self._left -= time.process_time() - started


def _stop(*_: Any) -> NoReturn:
    raise _Endless


@functools.lru_cache(maxsize=4096)
def pattern(text: str, given: str | None = None) -> Pattern:
    """The expression ``text``, compiled once; ``given`` is the part of it that came from elsewhere (all, if left out).

    Raises:
        re.error: it is none. Its matches raise Incompatible when they take too long.
    """
    return Pattern(text, text if given is None else given)
