"""A heat map in characters: colours where a terminal has them, else bars and digits. Pure: numbers to text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from stackctl.lora.module_grid import Cell, Grid, short_names

Line = list[tuple[str, str]]
"""Pieces of a line, each with its style as rich names it."""

_BARS = "▁▂▃▄▅▆▇█"
_ZERO = "·"
_ABSENT = " "
_ALIGNED = "+"
_HEAT = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""Dark to bright, even to the eye and for the colour-blind: five points of matplotlib's viridis."""
_SIGNED = ((215, 48, 39), (224, 130, 90), (96, 96, 96), (90, 160, 210), (33, 102, 200))
"""Opposed (red), unrelated (grey), aligned (blue)."""
_WIDEST = {True: 3, False: 2}
"""Columns that a cell takes at most, in colour and without, unless its number fits into it."""


@dataclass(frozen=True)
class Axes:
    """What stands at a map's sides: what runs across, the name of each column by layer, and of each row by kind."""

    across: str
    columns: Mapping[int, str]
    rows: Mapping[str, str]


@dataclass(frozen=True)
class HeatMap:
    """Numbers on a grid. ``top`` is the number of the brightest colour; zero is the darkest.

    ``signed`` maps run from -top to top. ``beside`` has, under a heading, a text to the right of each kind. What is no
    map of modules by layer brings names of its own.
    """

    grid: Grid
    values: Mapping[Cell, float | None]
    top: float
    signed: bool = False
    beside: Mapping[str, Sequence[str]] = field(default_factory=dict)
    names: Axes | None = None

    @property
    def axes(self) -> Axes:
        return self.names or Axes("layer", {n: str(n) for n in self.grid.layers}, short_names(self.grid.kinds))


def render_heat_map(heat: HeatMap, width: int, *, colours: bool) -> list[Line]:
    """The map in lines of at most ``width`` columns, with the numbers of layers above it and its scale below.

    Where not all layers fit beside one another, the map goes on below itself. Without colours a bar's height is the
    number; of signed maps, where one looks for what is opposed, a digit says how much; ``+`` is aligned.
    """
    axes = heat.axes
    names = axes.rows
    margin = min(max([len(axes.across), *map(len, names.values())]), max(width // 4, 8))
    beside = {heading: max(len(heading), *map(len, texts)) for heading, texts in heat.beside.items() if texts}
    room = max(width - margin - 1 - sum(columns + 2 for columns in beside.values()), 1)
    numbers = {cell: _number(value) for cell, value in heat.values.items() if value is not None}
    layers = heat.grid.layers
    cell = max([len(text) for text in numbers.values()], default=1) + 2
    with_numbers = cell * len(layers) <= room
    if not with_numbers:
        cell = min(max(room // len(layers), 1), _WIDEST[colours])
    bands = math.ceil(len(layers) / max(room // cell, 1))
    size = math.ceil(len(layers) / bands)
    lines: list[Line] = []
    for start in range(0, len(layers), size):
        band = layers[start : start + size]
        is_last = start + size >= len(layers)
        headings = "".join(f"  {heading:>{columns}}" for heading, columns in beside.items()) if is_last else ""
        above = _axis([axes.columns[layer] for layer in band], cell)
        lines.append([(f"{_cut(axes.across, margin):>{margin}} {above:{cell * len(band)}}{headings}".rstrip(), "dim")])
        for row, kind in enumerate(heat.grid.kinds):
            line: Line = [(f"{_cut(names[kind], margin):>{margin}} ", "")]
            for layer in band:
                text = numbers.get((kind, layer), "") if with_numbers else None
                line.append(_drawn(heat, heat.values.get((kind, layer), math.nan), text, cell, colours))
            if is_last and beside:
                line.append(("".join(f"  {heat.beside[h][row]:>{columns}}" for h, columns in beside.items()), ""))
            lines.append(line)
    return [*lines, [(" " * (margin + 1), ""), *_legend(heat, colours, with_numbers)]]


def _number(value: float) -> str:
    return f"{value:.2g}" if abs(value) < 100 else f"{value:.3g}"


def _cut(name: str, width: int) -> str:
    return name if len(name) <= width else "…" + name[len(name) - width + 1 :]


def _axis(names: Sequence[str], cell: int) -> str:
    """The names of columns above their cells: every one, or every second, fourth and so on where that is too close."""
    widest = max(map(len, names))
    step = next(step for step in (1, 2, 4, 5, 8, 10, 16, 20) if step * cell > widest or step == 20)
    text = ""
    for index in range(0, len(names), step):
        label = names[index]
        if not index or index * cell + len(label) <= cell * len(names):
            text = f"{text:{index * cell}}{label}"
    return text


def _drawn(heat: HeatMap, value: float | None, number: str | None, cell: int, colours: bool) -> tuple[str, str]:
    """One cell; NaN is a place without a module, None one where there is nothing to tell, such as a delta of zero."""
    if value is not None and math.isnan(value):
        return _ABSENT * cell, ""
    share = (value or 0.0) / heat.top if heat.top else 0.0
    if number is not None:
        text = f"{number or _ZERO:^{cell}}"
        return (text, _style(share, heat.signed)) if colours and number else (text, "")
    if value is None or (value == 0 and not heat.signed):
        return _ZERO * cell, ""
    if colours:
        return " " * cell, _style(share, heat.signed)
    return (_signed_sign(share) if heat.signed else _bar(share)) * cell, ""


def _bar(share: float) -> str:
    return _BARS[min(max(math.ceil(share * len(_BARS)) - 1, 0), len(_BARS) - 1)]


def _signed_sign(share: float) -> str:
    ninths = min(round(abs(share) * 9), 9)
    return _ZERO if not ninths else _ALIGNED if share > 0 else str(ninths)


def _style(share: float, signed: bool) -> str:
    red, green, blue = _colour(_SIGNED, (share + 1) / 2) if signed else _colour(_HEAT, share)
    ink = "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 128 else "#ffffff"
    return f"{ink} on #{red:02x}{green:02x}{blue:02x}"


def _colour(scale: Sequence[tuple[int, int, int]], share: float) -> tuple[int, int, int]:
    """A colour between the points of a scale."""
    at = min(max(share, 0.0), 1.0) * (len(scale) - 1)
    low, high = list(pairwise(scale))[min(int(at), len(scale) - 2)]
    part = at - min(int(at), len(scale) - 2)
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(low, high, strict=True))
    return red, green, blue


def _legend(heat: HeatMap, colours: bool, with_numbers: bool) -> Line:
    top = _number(heat.top)
    if not heat.top:
        return [(f"{_ZERO} zero everywhere", "dim")]
    if colours:
        steps = [step / 15 for step in range(16)]
        strip = [(" ", _style(2 * s - 1 if heat.signed else s, heat.signed)) for s in steps]
        ends = (f"-{top} opposed ", f" {top} aligned") if heat.signed else ("0 ", f" {top}")
        return [(ends[0], "dim"), *strip, (ends[1], "dim")]
    if with_numbers:
        return [("-1 opposed, 1 aligned" if heat.signed else f"0 to {top}", "dim")]
    if heat.signed:
        return [(f"1-9 opposed, 9 is -{top}; {_ZERO} unrelated; {_ALIGNED} aligned", "dim")]
    return [(f"0 {_BARS} {top}, {_ZERO} zero", "dim")]
