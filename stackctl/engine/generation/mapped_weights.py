"""Whether steps are quicker with weights copied from mapped files into memory of the process: tried on a few of them.

A step reads every weight once. Where a file has long been in the system's cache its pages lie scattered, and a virtual
machine may read them at half the speed of memory of its own; where they lie well, a copy would only take its time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol

from stackctl.machine.resources import main_memory

_TIMED = 5
"""Steps that are timed with weights as they are mapped, and then with copies; the first of them does not count."""
_TRIED = 3
"""Parts that are copied at first."""
_LEAST = 1 << 20
"""Bytes of a part from which on its time is worth looking at."""
_LIKELY = 0.5
"""The share of the steps that may still come which is counted on."""


class Parts(Protocol):
    """Parts of a model that are computed one after another: the mapped bytes of each, and what copies them."""

    @property
    def sizes(self) -> Sequence[int]: ...
    def copy(self, number: int) -> None: ...


class MappedWeights:
    """Copies the mapped weights of ``parts`` once it is known to pay: called before each step, and within it."""

    def __init__(self, parts: Parts, clock: Callable[[], float] = time.perf_counter) -> None:
        self._parts, self._clock = parts, clock
        self._rows = 0
        self._tried: list[int] = []
        self._seconds = 0.0
        self._marks: list[list[float]] = []
        self._is_timed = self._is_over = False

    def prepare(self, rows: int, steps: int) -> bool:
        """Before a step of so many rows, with so many that may still come; whether anything was copied."""
        if self._is_over:
            return False
        if rows != self._rows:  # steps of other rows take another time
            self._rows, self._tried, self._marks = rows, [], []
        if len(self._marks) < self._wanted:
            return False
        sizes = self._parts.sizes
        if not self._tried:
            large = [number for number, size in enumerate(sizes) if size >= _LEAST]
            self._tried = sorted(large, key=sizes.__getitem__)[:_TRIED]
            self._is_over = not large or sum(sizes) > main_memory().available // 4
            self._seconds = 0.0 if self._is_over else self._copy(self._tried)
            return not self._is_over
        self._is_over = True
        left = [number for number, size in enumerate(sizes) if size]
        pays = bool(left) and self._gain() * steps * _LIKELY > self._seconds
        if pays:
            self._copy(left)
        return pays

    def begin(self) -> None:
        """A step begins."""
        self._is_timed = not self._is_over and len(self._marks) < self._wanted
        if self._is_timed:
            self._marks.append([self._clock()])

    def passed(self) -> None:
        """The next part was computed."""
        if self._is_timed:
            self._marks[-1].append(self._clock())

    @property
    def _wanted(self) -> int:
        return 2 * _TIMED if self._tried else _TIMED

    def _copy(self, numbers: Sequence[int]) -> float:
        started = self._clock()
        for number in numbers:
            self._parts.copy(number)
        return self._clock() - started

    def _gain(self) -> float:
        """Seconds that the copied parts save in a step."""
        took = [[end - start for start, end in pairwise(marks)] for marks in self._marks]
        mapped, copied = took[1:_TIMED], took[_TIMED + 1 :]

        def usual(steps: Sequence[Sequence[float]], part: int) -> float:
            return statistics.median(times[part] for times in steps)

        return sum(usual(mapped, part) - usual(copied, part) for part in self._tried)
