"""Loss curves as a small SVG picture. Pure: numbers to text.

The picture stands by itself on white; a page that holds it gives its classes (ground, grid, label) other colours.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from stackctl.render.loss_curve.log import Curve, thinned, ticks

PICTURE = "training_loss.svg"
"""The picture beside an adapter's weights and in a card."""

_WIDTH, _HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 36, 40
_MOST_POINTS = 240
_STYLE = 'font-family="system-ui, sans-serif" font-size="12" role="img" aria-label="training loss by step"'
_LABEL = 'class="label" fill="#475569"'
_COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#475569")


def render_svg(curves: Mapping[str, Curve]) -> str | None:
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
    x = _scale(0.0, max(*steps, 1.0), _LEFT, _WIDTH - _RIGHT)
    low, high = min(*losses, 0.0), max(*losses, 1e-9)
    y = _scale(low, high, _HEIGHT - _BOTTOM, _TOP)
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


class _scale:  # noqa: N801 (it is used as a function)
    """Numbers from ``low`` to ``high`` to places on the picture."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self._low, self._start = low, start
        self._factor = (end - start) / (high - low)

    def __call__(self, value: float) -> str:
        return f"{self._start + (value - self._low) * self._factor:.1f}"
