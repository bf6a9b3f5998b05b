"""A loss curve in characters: braille dots for training, rings for held-out records. Pure: numbers to text."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

from stackctl.render.loss_curve.log import Curve, Point, thinned

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""The bits of a braille character: four rows of two dots."""
_RING = "o"


def render_terminal(curve: Curve, width: int = 80, height: int = 8) -> list[str]:
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
