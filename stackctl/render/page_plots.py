"""Plots of a page, curves among them, as places and sizes, which ``templates/plots.html`` draws as SVG.

Pure: numbers to numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stackctl.render.heat_map import HeatMap
from stackctl.render.loss_curve import scale, ticks
from stackctl.render.terminal import shortened, signed

_LETTER = 7.0
"""Width of a letter as drawn, about."""
_ROW = 22
SERIES = 6
"""Lines that a plot tells apart by colour."""


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle. ``look`` is its class; ``title`` is shown when one points at it."""

    x: float
    y: float
    width: float
    height: float
    look: str
    opacity: float = 1.0
    title: str = ""


@dataclass(frozen=True, slots=True)
class Label:
    x: float
    y: float
    text: str
    anchor: str = "start"
    look: str = "label"


@dataclass(frozen=True, slots=True)
class Line:
    """Points joined; ``look`` is its class."""

    points: str
    look: str


@dataclass(frozen=True)
class Plot:
    """What is drawn, in this order: lines, boxes, labels. ``name`` says what it is to who cannot see it."""

    name: str
    width: float
    height: float
    boxes: Sequence[Box]
    labels: Sequence[Label]
    lines: Sequence[Line] = ()


def heat_plot(name: str, heat: HeatMap) -> Plot:
    """Layers across, kinds of module down, and beside each what stands there."""
    axes = heat.axes
    kinds = {kind: shortened(name, 40) for kind, name in axes.rows.items()}
    left = max(map(len, [*kinds.values(), axes.across])) * _LETTER + 10
    layers = heat.grid.layers
    cell = min(max(760 / len(layers), 7.0), 44.0)
    top, right = 20.0, left + cell * len(layers)
    boxes = [
        _cell(heat, value, left + layers.index(layer) * cell, top + row * _ROW, cell, f"{_of(heat, kind, layer)}")
        for row, kind in enumerate(heat.grid.kinds)
        for layer in layers
        if (value := heat.values.get((kind, layer), math.nan)) is None or not math.isnan(value)
    ]
    wide = max(26, max(map(len, axes.columns.values())) * _LETTER + 4)
    step = next(step for step in (1, 2, 4, 5, 10, 20, 50, 100) if step * cell >= wide or step == 100)
    labels = [
        Label(left + (n + 0.5) * cell, top - 7, axes.columns[layers[n]], "middle") for n in range(0, len(layers), step)
    ]
    labels += [Label(left - 8, top - 7, axes.across, "end")] if heat.names else []
    labels += [Label(left - 8, top + (n + 0.7) * _ROW, kinds[kind], "end") for n, kind in enumerate(heat.grid.kinds)]
    for heading, texts in heat.beside.items():
        right += max(map(len, [heading, *texts])) * _LETTER + 18
        labels.append(Label(right, top - 7, heading, "end"))
        labels += [Label(right, top + (n + 0.7) * _ROW, text, "end", "figure") for n, text in enumerate(texts)]
    bottom = top + _ROW * len(heat.grid.kinds)
    scale_boxes, scale_labels = _scale(heat, left, bottom + 12)
    width = max(right, scale_labels[-1].x + len(scale_labels[-1].text) * _LETTER) + 4
    return Plot(name, width, bottom + 34, [*boxes, *scale_boxes], [*labels, *scale_labels])


def _of(heat: HeatMap, kind: str, layer: int) -> str:
    """A cell in words: its module, or how many, and their number."""
    modules, value = heat.grid.cells[kind, layer], heat.values[kind, layer]
    what = modules[0] if len(modules) == 1 else f"{modules[0]} and {len(modules) - 1} more"
    return f"{what}: {'zero' if value is None else format(value, '.3g')}"


def _cell(heat: HeatMap, value: float | None, x: float, y: float, size: float, title: str) -> Box:
    share = min(abs(value or 0.0) / heat.top, 1.0) if heat.top else 0.0
    look = "zero" if value is None or (not value and not heat.signed) else _look(heat, value)
    return Box(round(x, 1), y, round(size - 1, 1), _ROW - 1, look, round(share, 3), title)


def _look(heat: HeatMap, value: float) -> str:
    return "heat" if not heat.signed else "opposed" if value < 0 else "aligned"


def _scale(heat: HeatMap, x: float, y: float) -> tuple[list[Box], list[Label]]:
    """The colours from least to most, with the numbers at both ends."""
    steps = [(n + 1) / 10 for n in range(10)]
    shares = [-s for s in reversed(steps)] + steps if heat.signed else steps
    ends = (f"{-heat.top:.2g} opposed", f"{heat.top:.2g} aligned") if heat.signed else ("0", f"{heat.top:.3g}")
    start = x + len(ends[0]) * _LETTER + 8
    boxes = [Box(round(start + 12 * n, 1), y, 12, 10, _look(heat, share), abs(share)) for n, share in enumerate(shares)]
    end = start + 12 * len(shares) + 8
    return boxes, [Label(x, y + 9, ends[0]), Label(end, y + 9, ends[1])]


def matrix_plot(name: str, members: Sequence[str], values: Mapping[tuple[int, int], float | None], top: float) -> Plot:
    """Every two members and their number, which is signed; members are numbered, since their names may be long."""
    size = 62.0
    names = [shortened(f"{n} {member}", 40) for n, member in enumerate(members, 1)]
    left, over = max(map(len, names)) * _LETTER + 10, 20.0
    boxes, labels = [], []
    for (row, column), value in values.items():
        for down, across in ((row, column), (column, row)):
            x, y = left + across * size, over + down * 34
            share = min(abs(value or 0.0) / top, 1.0)
            look = "zero" if value is None else "opposed" if value < 0 else "aligned"
            text = "-" if value is None else signed(value, 3)
            title = f"{members[down]} and {members[across]}: {text}"
            boxes.append(Box(x, y, size - 1, 33, look, round(0.6 * share, 3), title))  # pale, for the number upon it
            labels.append(Label(x + size / 2, y + 21, text, "middle", "figure"))
    for n, text in enumerate(names):
        labels.append(Label(left - 8, over + n * 34 + 21, text, "end"))
        labels.append(Label(left + (n + 0.5) * size, over - 7, str(n + 1), "middle"))
    return Plot(name, left + size * len(members) + 4, over + 34 * len(members) + 4, boxes, labels)


def line_plot(name: str, series: Mapping[str, Sequence[tuple[int, float | None]]], *, least: float) -> Plot:
    """One line for each name, over layers. The axis goes through 0, and to ``least`` at least; no value is a gap."""
    width, left, right, bottom = 820.0, 56.0, 16.0, 22.0
    over = 12.0 + 17 * len(series)
    values = [value for points in series.values() for _, value in points if value is not None]
    layers = sorted({layer for points in series.values() for layer, _ in points})
    low, high = min([0.0, *values]), max([least, *values])
    height = over + 150 + bottom

    alone = layers[0] == layers[-1]  # in the middle
    x = scale(layers[0] - alone, layers[-1] + alone, left + 8, width - right - 8)
    y = scale(low, high, over + 150, over)
    lines, boxes = list[Line](), list[Box]()
    labels = [Label(left - 8, over + 150 + 16, "layer", "end")]
    for tick in ticks(low, high):
        lines.append(Line(f"{left},{y(tick)} {width - right},{y(tick)}", "grid axis" if tick == 0 else "grid"))
        labels.append(Label(left - 8, y(tick) + 4, f"{tick:g}", "end"))
    step = max(1, math.ceil(len(layers) / 26))
    labels += [Label(x(layer), over + 150 + 16, str(layer), "middle") for layer in layers[::step]]
    for index, (who, points) in enumerate(series.items()):
        look = f"s{index % SERIES}"
        labels.append(Label(left, 12.0 + 17 * index, shortened(who, 100), look=look))
        for run in _runs(points):
            lines.append(Line(" ".join(f"{x(layer)},{y(value)}" for layer, value in run), look))
            boxes += [
                Box(x(n) - 2.5, y(v) - 2.5, 5, 5, f"dot {look}", title=f"{who}, layer {n}: {v:.3g}") for n, v in run
            ]
    return Plot(name, width, height, boxes, labels, lines)


def _runs(points: Sequence[tuple[int, float | None]]) -> list[list[tuple[int, float]]]:
    """Points up to the next gap."""
    runs: list[list[tuple[int, float]]] = [[]]
    for layer, value in points:
        if value is None:
            runs.append([])
        else:
            runs[-1].append((layer, value))
    return [run for run in runs if run]


def tree_plot(name: str, nodes: Sequence[tuple[int, str, str, str]]) -> Plot:
    """A tree, a line for each node: its depth, its name, what there is to say of it, and how it looks."""
    boxes, labels, lines, at = list[Box](), list[Label](), list[Line](), dict[int, float]()
    width = 0.0
    for row, (depth, title, remark, look) in enumerate(nodes):
        x, y, size = 26.0 * depth, 32.0 * row + 2, len(title) * (_LETTER + 0.6) + 20
        boxes.append(Box(x, y, size, 26, f"node {look}"))
        labels.append(Label(x + 10, y + 17.5, title, look="node"))
        labels.append(Label(x + size + 10, y + 17.5, shortened(remark, 110)))
        if depth and depth - 1 in at:
            lines.append(Line(f"{x - 13},{at[depth - 1]} {x - 13},{y + 13} {x},{y + 13}", "branch"))
        at[depth] = y + 26
        width = max(width, x + size + 20 + len(shortened(remark, 110)) * _LETTER)
    return Plot(name, width, 32.0 * len(nodes), boxes, labels, lines)


_WIDTH, _HEIGHT, _LEFT, _RIGHT, _BOTTOM = 820.0, 240.0, 72.0, 24.0, 26.0


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

    bottom = over + _HEIGHT
    x = scale(x_low, x_high, _LEFT, _WIDTH - _RIGHT)
    y = scale(y_low, y_high, bottom, over)
    lines, boxes = list[Line](), list[Box]()
    labels = [Label(_WIDTH - _RIGHT, bottom + _BOTTOM + 10, across, "end"), Label(8, over - 12, up)]
    for tick in ticks(y_low, y_high):
        lines.append(Line(f"{_LEFT},{y(tick)} {_WIDTH - _RIGHT},{y(tick)}", "grid"))
        labels.append(Label(_LEFT - 8, y(tick) + 4, f"{tick:g}", "end"))
    labels += [Label(x(tick), bottom + 18, f"{tick:g}", "middle") for tick in ticks(x_low, x_high)]
    for index, (who, points) in enumerate(series.items()):
        look = f"s{index % SERIES}"
        labels.append(Label(_LEFT, 12.0 + 17 * index, shortened(who, 100), look=look))
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
