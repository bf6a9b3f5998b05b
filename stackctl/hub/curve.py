"""The loss curve of a run of training as a small SVG picture. Pure: text to numbers to text."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

Point = tuple[float, float]
"""A step and its loss."""

_WIDTH, _HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 36, 40
_MOST_POINTS = 240
_STYLE = 'font-family="system-ui, sans-serif" font-size="12" role="img" aria-label="training loss by step"'
_COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#475569")


def parse_curve(text: str) -> list[Point]:
    """The points of a ``training_log.jsonl``; lines without a step and a finite loss are passed over."""
    points = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
            step, loss = float(record["step"]), float(record["loss"])
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if math.isfinite(step) and math.isfinite(loss):
            points.append((step, loss))
    return points


def render_curves(curves: Mapping[str, Sequence[Point]]) -> str | None:
    """One picture of some runs, each a line with its name; None when there is nothing to show.

    Long runs are drawn by the means of equal pieces, so that the picture stays a few kilobytes.
    """
    drawn = {name: _thinned(points) for name, points in curves.items() if points}
    if not drawn:
        return None
    steps = [step for points in drawn.values() for step, _ in points]
    losses = [loss for points in drawn.values() for _, loss in points]
    x = _scale(0.0, max(*steps, 1.0), _LEFT, _WIDTH - _RIGHT)
    low, high = min(*losses, 0.0), max(*losses, 1e-9)
    y = _scale(low, high, _HEIGHT - _BOTTOM, _TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" {_STYLE}>',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
    ]
    for value in _ticks(low, high):
        parts.append(f'<path d="M{_LEFT} {y(value)}H{_WIDTH - _RIGHT}" stroke="#e2e8f0"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y(value)}" dy="4" text-anchor="end" fill="#475569">{value:g}</text>')
    for value in _ticks(0.0, max(*steps, 1.0)):
        place = f'x="{x(value)}" y="{_HEIGHT - _BOTTOM + 18}"'
        parts.append(f'<text {place} text-anchor="middle" fill="#475569">{value:g}</text>')
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 6}" text-anchor="end" fill="#475569">step</text>')
    for index, (name, points) in enumerate(drawn.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        line = " ".join(f"{x(step)},{y(loss)}" for step, loss in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        last = points[-1]
        parts.append(f'<circle cx="{x(last[0])}" cy="{y(last[1])}" r="3" fill="{colour}"/>')
        place = f'x="{_LEFT + 130 * (index % 4)}" y="{14 + 14 * (index // 4)}"'
        parts.append(f'<text {place} fill="{colour}">{escape(name)}: {last[1]:.3g}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _thinned(points: Sequence[Point]) -> list[Point]:
    if len(points) <= _MOST_POINTS:
        return list(points)
    bounds = [round(index * len(points) / _MOST_POINTS) for index in range(_MOST_POINTS + 1)]
    pieces = [points[start:end] for start, end in itertools.pairwise(bounds)]
    return [(sum(s for s, _ in p) / len(p), sum(v for _, v in p) / len(p)) for p in pieces]


class _scale:  # noqa: N801 (it is used as a function)
    """Numbers from ``low`` to ``high`` to places on the picture."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self._low, self._start = low, start
        self._factor = (end - start) / (high - low)

    def __call__(self, value: float) -> str:
        return f"{self._start + (value - self._low) * self._factor:.1f}"


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers between two."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(step * index, 10) for index in range(first, math.floor(high / step + 1e-9) + 1)]
