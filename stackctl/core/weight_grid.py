"""Weights to be tried: ``style=0:1.5:0.25``, and the grid of one or two of these. Pure: text to numbers.

Numbers are counted in decimals, as they are typed, so that the third of ``0:0.3:0.1`` is 0.3 and not
0.30000000000000004.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from stackctl.core.errors import StackctlError, Usage, attempt, did_you_mean, raise_all
from stackctl.core.expressions import cut

MOST_POINTS = 1_000
"""Points of a grid: each is an evaluation of all the data."""
MOST_AXES = 2
_AXIS = re.compile(r"(?P<name>[^=]+)=(?P<first>[^:]*):(?P<last>[^:]*):(?P<step>[^:]*)")
_HINT = "write NAME=FIRST:LAST:STEP, for example style=0:1.5:0.25"


@dataclass(frozen=True, slots=True)
class Axis:
    """The weights of one member that are tried, in order; both ends are among them."""

    name: str
    values: tuple[float, ...]


def parse_axis(text: str) -> Axis:
    """``style=0:1.5:0.25``. Where the step does not meet the last number, that one is tried as well.

    Raises:
        Usage: everything that is wrong with it, at once.
    """
    match = _AXIS.fullmatch(text.strip())
    if not match:
        raise Usage(f"--sweep '{cut(text)}' is not NAME=FIRST:LAST:STEP", hint=_HINT)
    problems: list[StackctlError] = []
    typed = f"--sweep '{cut(text)}'"

    def number(key: str) -> Decimal:
        """A number, or NaN, with which nothing compares."""
        try:
            found = Decimal(match[key].strip())
        except InvalidOperation:
            found = Decimal("NaN")
        if not (found.is_finite() and math.isfinite(float(found))):
            problems.append(Usage(f"{typed}: '{cut(match[key])}' is not a finite number", hint=_HINT))
            return Decimal("NaN")
        return found

    first, last, step = number("first"), number("last"), number("step")
    if not step.is_nan() and step <= 0:
        problems.append(Usage(f"{typed}: the step is not larger than 0", hint=_HINT))
    if not first.is_nan() and not last.is_nan() and first > last:
        hint = f"begin with the lower: {match['name']}={last}:{first}:…"
        problems.append(Usage(f"{typed}: the ends are reversed", hint=hint))
    raise_all(problems)
    if (last - first) / step > MOST_POINTS:
        hint = "take a larger step, and then a finer one around the best"
        raise Usage(f"{typed} has more than {MOST_POINTS:,} points", hint=hint)
    values = [first + step * number for number in range(int((last - first) / step) + 1)]
    if values[-1] != last:
        values.append(last)
    return Axis(match["name"].strip(), tuple(float(value) + 0.0 for value in values))


def parse_axes(texts: Sequence[str]) -> list[Axis]:
    """The axes of a grid.

    Raises:
        Usage: everything that is wrong with them, at once; a member twice, more than two, too many points.
    """
    problems: list[StackctlError] = []
    axes: list[Axis] = [axis for text in texts if (axis := attempt(problems, parse_axis, text))]
    names = [axis.name for axis in axes]
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            problems.append(Usage(f"--sweep names {name} twice", hint="give each member one range of weights"))
    if len(texts) > MOST_AXES:
        what = f"--sweep is given {len(texts)} times, and a grid has {MOST_AXES} axes at most"
        hint = "fix the other weights in the expression, or find them all at once with --fit FILE"
        problems.append(Usage(what, hint=hint))
    if (points := math.prod(len(axis.values) for axis in axes)) > MOST_POINTS:
        what = f"the grid has {points:,} points, and {MOST_POINTS:,} are tried at most"
        problems.append(Usage(what, hint="take larger steps"))
    raise_all(problems)
    return axes


def place_axes(axes: Sequence[Axis], members: Sequence[tuple[str, str]]) -> list[int]:
    """Which member each axis means, by number, out of their names and labels (``style``, ``style@1``).

    Raises:
        Usage: an axis names none, or two of them name the same.
    """
    problems: list[StackctlError] = []
    found: list[int] = []
    for axis in axes:
        number = next((n for n, known in enumerate(members) if axis.name in known), None)
        if number is None:
            names = [name for name, _ in members]
            hint = did_you_mean(axis.name, names, f"its members: {', '.join(names) or 'none'}")
            problems.append(Usage(f"--sweep: '{cut(axis.name)}' is not in the stack", hint=hint))
        elif number in found:
            problems.append(Usage(f"--sweep names {members[number][0]} twice", hint="give each member one range"))
        else:
            found.append(number)
    raise_all(problems)
    return found


def grid_points(axes: Sequence[Axis]) -> list[tuple[float, ...]]:
    """Every combination of weights, the last axis running fastest."""
    return list(itertools.product(*(axis.values for axis in axes)))


def not_dominated(points: Sequence[Sequence[float]]) -> list[int]:
    """Those points, by number, that no other is as good as in all numbers and better in one; lower is better."""
    return [
        number
        for number, own in enumerate(points)
        if not any(
            all(a <= b for a, b in zip(other, own, strict=True)) and tuple(other) != tuple(own) for other in points
        )
    ]
