"""The loss curve of a training run: read from its log, drawn as SVG and in characters on a terminal.

``training_log.jsonl`` has a line for each step with its ``loss``, and one for each evaluation with its ``eval_loss``.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from stackctl.core.errors import Usage
from stackctl.storage.files import read_bounded

LOG = "training_log.jsonl"
"""The file beside an adapter's weights."""

_LARGEST = 1e15
"""Steps and losses above it are none, and could not be drawn."""

Point = tuple[float, float]
"""A step and its loss (nats)."""


@dataclass(frozen=True)
class Curve:
    """The losses of a run: of each step's own records, and on held-out ones."""

    training: tuple[Point, ...] = ()
    held_out: tuple[Point, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.training or self.held_out)


def parse_curve(text: str) -> Curve:
    """The curve in a log; lines without a step and a loss are passed over."""
    found: dict[str, list[Point]] = {"loss": [], "eval_loss": []}
    for line in text.splitlines():
        try:
            record = json.loads(line)
            key = next(key for key in found if key in record)
            step, loss = float(record["step"]), float(record[key])
        except (ValueError, KeyError, TypeError, StopIteration, RecursionError, OverflowError):
            continue
        if 0 <= step <= _LARGEST and abs(loss) <= _LARGEST:
            found[key].append((step, loss))
    return Curve(tuple(found["loss"]), tuple(found["eval_loss"]))


def read_curve(folder: Path) -> Curve:
    """The curve beside a checkpoint; empty where there is none."""
    path = folder / LOG
    try:
        return parse_curve(read_bounded(path).decode(errors="replace")) if path.is_file() else Curve()
    except (OSError, Usage):
        return Curve()


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """At most so many points: the means of equal pieces."""
    if len(points) <= most:
        return list(points)
    bounds = [round(index * len(points) / most) for index in range(most + 1)]
    pieces = [points[start:end] for start, end in itertools.pairwise(bounds)]
    return [(sum(s for s, _ in p) / len(p), sum(v for _, v in p) / len(p)) for p in pieces]


def ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers between two."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(step * index, 10) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Numbers from ``low`` to ``high`` to places of a picture."""
    factor = (end - start) / (high - low)
    return lambda value: round(start + (value - low) * factor, 1)


# -- as SVG ------------------------------------------------------------------------------------------------------------

PICTURE = "training_loss.svg"
"""The picture beside an adapter's weights and in a card."""

_WIDTH, _HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 36, 40
_MOST_POINTS = 240
_STYLE = 'font-family="system-ui, sans-serif" font-size="12" role="img" aria-label="training loss by step"'
_LABEL = 'class="label" fill="#475569"'
_COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#475569")


def render_curve_svg(curves: Mapping[str, Curve]) -> str | None:
    """One picture of some runs, each a line with its name; None when there is nothing to show.

    Held-out losses are a dashed line with dots in the run's colour. Long runs are drawn by the means of equal pieces,
    so that the picture stays a few kilobytes.
    """
    lines = [
        (name, points, _COLOURS[index % len(_COLOURS)], dashed)
        for index, (name, curve) in enumerate((n, c) for n, c in curves.items() if c)
        for dashed, points in ((False, thinned(curve.training, _MOST_POINTS)), (True, list(curve.held_out)))
        if points
    ]
    if not lines:
        return None
    steps = [step for _, points, _, _ in lines for step, _ in points]
    losses = [loss for _, points, _, _ in lines for _, loss in points]
    x = scale(0.0, max(*steps, 1.0), _LEFT, _WIDTH - _RIGHT)
    low, high = min(*losses, 0.0), max(*losses, 1e-9)
    y = scale(low, high, _HEIGHT - _BOTTOM, _TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" {_STYLE}>',
        f'<rect class="ground" width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
    ]
    for value in ticks(low, high):
        parts.append(f'<path class="grid" d="M{_LEFT} {y(value)}H{_WIDTH - _RIGHT}" stroke="#e2e8f0"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y(value)}" dy="4" text-anchor="end" {_LABEL}>{value:g}</text>')
    for value in ticks(0.0, max(*steps, 1.0)):
        place = f'x="{x(value)}" y="{_HEIGHT - _BOTTOM + 18}"'
        parts.append(f'<text {place} text-anchor="middle" {_LABEL}>{value:g}</text>')
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 6}" text-anchor="end" {_LABEL}>step</text>')
    for index, (name, points, colour, dashed) in enumerate(lines):
        dots = points if dashed else points[-1:]
        pairs = " ".join(f"{x(step)},{y(loss)}" for step, loss in points)
        style = ' stroke-dasharray="5 4"' if dashed else ""
        parts.append(f'<polyline points="{pairs}" fill="none" stroke="{colour}" stroke-width="2"{style}/>')
        parts += [f'<circle cx="{x(step)}" cy="{y(loss)}" r="3" fill="{colour}"/>' for step, loss in dots]
        place = f'x="{_LEFT + 142 * (index % 4)}" y="{14 + 14 * (index // 4)}"'
        label = f"{name} held-out" if dashed else name
        parts.append(f'<text {place} fill="{colour}">{escape(label, quote=False)}: {points[-1][1]:.3g}</text>')
    return "\n".join([*parts, "</svg>", ""])


# -- on a terminal -----------------------------------------------------------------------------------------------------

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""The bits of a braille character: four rows of two dots."""
_RING = "o"


def render_curve(curve: Curve, width: int = 80, height: int = 8) -> list[str]:
    """Lines of at most ``width`` columns: a plot of ``height`` rows, the steps under it, and a legend.

    The vertical axis goes from the lowest to the highest loss, so that a small fall of a long run is seen. Empty when
    there is nothing to draw.
    """
    if not curve:
        return []
    everything = [*curve.training, *curve.held_out]
    low, high = min(loss for _, loss in everything), max(loss for _, loss in everything)
    last = max(step for step, _ in everything)
    labels = [f"{high:.3g}", f"{(high + low) / 2:.3g}", f"{low:.3g}"]
    margin = max(map(len, labels))
    columns = max(width - margin - 3, 8)

    def place(across: int, down: int) -> Callable[[Point], tuple[int, int]]:
        """Where a point lies among so many cells: from the left, and from the top."""
        spread = high - low
        return lambda point: (
            round(point[0] / max(last, 1.0) * (across - 1)),
            round((high - point[1]) / spread * (down - 1)) if spread else down // 2,
        )

    cells = [[0] * columns for _ in range(height)]
    dots = [place(2 * columns, 4 * height)(point) for point in thinned(curve.training, 2 * columns)]
    for x, y in _joined(dots):
        cells[y // 4][x // 2] |= _DOTS[y % 4][x % 2]
    rows = [[chr(0x2800 + bits) if bits else " " for bits in row] for row in cells]
    for point in curve.held_out:
        x, y = place(columns, height)(point)
        rows[y][x] = _RING
    at = {0: labels[0], height // 2: labels[1], height - 1: labels[2]}
    lines = [f"{at.get(n, ''):>{margin}} ┤{''.join(row)}".rstrip() for n, row in enumerate(rows)]
    end = f"step {last:g}"
    lines.append(f"{'':{margin}} └{'─' * columns}")
    lines.append(f"{'':{margin}}  0{end:>{columns - 1}}")
    return [*lines, *_legend(curve, margin)]


def _joined(dots: list[tuple[int, int]]) -> Iterable[tuple[int, int]]:
    """The dots, and those between neighbours, so that a steep fall is a line."""
    yield from dots[:1]
    for (x, y), (next_x, next_y) in itertools.pairwise(dots):
        length = max(abs(next_x - x), abs(next_y - y), 1)
        for part in range(1, length + 1):
            yield x + round((next_x - x) * part / length), y + round((next_y - y) * part / length)


def _legend(curve: Curve, margin: int) -> list[str]:
    signs = (("⣀", "training loss", curve.training), (_RING, "held-out loss", curve.held_out))
    return [
        f"{'':{margin}}  {sign} {what} {points[0][1]:.3f} -> {points[-1][1]:.3f}"
        + (f", lowest {min(loss for _, loss in points):.3f}" if sign == _RING else "")
        for sign, what, points in signs
        if points
    ]
