"""A plot of lines over a number, as places and sizes that ``templates/plots.html`` draws. Pure: numbers to numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stackctl.render.loss_curve import ticks
from stackctl.render.page_plots import SERIES, Box, Label, Line, Plot

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _BOTTOM = 820.0, 240.0, 72.0, 24.0, 26.0
_MOST = 100


@dataclass(frozen=True, slots=True)
class Point:
    """A place on a curve. ``error`` is drawn up and down from it; ``title`` is shown when one points at it."""

    x: float
    y: float
    title: str = ""
    error: float = 0.0


def curve_plot(
    name: str, across: str, up: str, series: Mapping[str, Sequence[Point]], loose: Mapping[str, Sequence[Point]]
) -> Plot:
    """One line for each name of ``series``, and dots that no line joins for each of ``loose``, in look ``<name>``.

    The axes go from the lowest to the highest number, so that a small difference is seen.
    """
    every = [point for points in [*series.values(), *loose.values()] for point in points]
    x_low, x_high = _spread([p.x for p in every])
    y_low, y_high = _spread([p.y + sign * p.error for p in every for sign in (-1, 1)])
    over = 30.0 + 17 * len(series)

    def x(value: float) -> float:
        return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * (value - x_low) / (x_high - x_low), 1)

    def y(value: float) -> float:
        return round(over + _HEIGHT * (y_high - value) / (y_high - y_low), 1)

    bottom = over + _HEIGHT
    lines, boxes = list[Line](), list[Box]()
    labels = [Label(_WIDTH - _RIGHT, bottom + _BOTTOM + 10, across, "end"), Label(8, over - 12, up)]
    for tick in ticks(y_low, y_high):
        lines.append(Line(f"{_LEFT},{y(tick)} {_WIDTH - _RIGHT},{y(tick)}", "grid"))
        labels.append(Label(_LEFT - 8, y(tick) + 4, f"{tick:g}", "end"))
    labels += [Label(x(tick), bottom + 18, f"{tick:g}", "middle") for tick in ticks(x_low, x_high)]
    for index, (who, points) in enumerate(series.items()):
        look = f"s{index % SERIES}"
        labels.append(Label(_LEFT, 12.0 + 17 * index, who if len(who) <= _MOST else who[: _MOST - 1] + "…", look=look))
        lines.append(Line(" ".join(f"{x(p.x)},{y(p.y)}" for p in points), look))
        for p in points:
            if p.error:
                lines.append(Line(f"{x(p.x)},{y(p.y - p.error)} {x(p.x)},{y(p.y + p.error)}", f"{look} error"))
            boxes.append(Box(x(p.x) - 2.5, y(p.y) - 2.5, 5, 5, f"dot {look}", title=p.title))
    for look, points in loose.items():
        size = 9 if look == "best" else 5
        boxes += [Box(x(p.x) - size / 2, y(p.y) - size / 2, size, size, f"dot {look}", title=p.title) for p in points]
    return Plot(name, _WIDTH, bottom + _BOTTOM + 16, boxes, labels, lines)


def _spread(values: Sequence[float]) -> tuple[float, float]:
    """The lowest and the highest, with a little room at both ends."""
    low, high = min(values), max(values)
    room = (high - low) / 20 or max(abs(high), 1.0) / 20
    return (low - room, high + room) if math.isfinite(room) else (0.0, 1.0)
