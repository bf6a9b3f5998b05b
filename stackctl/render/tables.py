"""Tables, trees, heat maps and texts side by side, as commands draw them. rich is imported only when one is drawn."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich import box
from rich.cells import cell_len, chop_cells
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from stackctl.render.terminal import shortened

if TYPE_CHECKING:
    from stackctl.render.heat_map import HeatMap

NUMERIC = {"parameters", "rank", "loss", "±", "perplexity", "accuracy", "tokens", "records", "weight", "size", "step"}


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str | None = None) -> RenderableType:
    """A plain table: no frame, a rule under its head, numbers to the right; a title may be wider than it is."""
    drawn = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for column in columns:
        drawn.add_column(column, justify="right" if column.strip() in NUMERIC else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return Group(Text(title, style="bold"), drawn) if title else drawn


def marked(text: str, best: bool) -> Text:
    """A number in a column: the best one in green with a star, any other with room for one."""
    return Text(f"{text}*", "bold green") if best else Text(f"{text} ")


def spaced(parts: Sequence[RenderableType]) -> Group:
    """What is told together, with an empty line between two of them."""
    lines: list[RenderableType] = []
    for part in parts:
        lines += [part] if not lines else ["", part]
    return Group(*lines)


class StreamedTable:
    """A table of any length, drawn row by row: it looks as :func:`table`, for which rich needs all of it at once.

    ``rows`` is called twice, to measure and to draw. What is too wide for its column is broken with no regard to words.
    """

    def __init__(self, columns: Sequence[str], rows: Callable[[], Iterable[Sequence[str]]]) -> None:
        self._columns = columns
        self._rows = rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        between = len(_GAP) * (len(self._columns) - 1)
        widths = _widths(self._columns)
        for row in self._rows():
            widths = list(map(max, widths, _widths(row)))
        widths = _fit(widths, options.max_width - between)
        signs = [">" if column.strip() in NUMERIC else "<" for column in self._columns]
        layout = _GAP.join(f"{{:{sign}{width}}}" for sign, width in zip(signs, widths, strict=True))
        for line in _lines(self._columns, widths, layout):
            yield Segment(line, console.get_style("bold"))
            yield Segment.line()
        yield Segment("─" * (sum(widths) + between) + "\n")
        lines = (line for row in self._rows() for line in _lines(row, widths, layout))
        while some := list(itertools.islice(lines, _LINES)):
            yield Segment("\n".join(some) + "\n")


_GAP = "   "
_LINES = 20
"""How many lines of a listing are given to rich at once."""


def _widths(cells: Sequence[str]) -> list[int]:
    """The columns of a terminal that each cell takes, as it is printed."""
    is_ascii = "".join(cells).isascii()
    return [len(cell) if is_ascii else cell_len(_printable(cell)) for cell in cells]


def _fit(widths: list[int], room: int) -> list[int]:
    """Narrow the widest columns until all fit."""
    limit = max(widths)
    while limit > 1 and sum(min(width, limit) for width in widths) > room:
        limit -= 1
    return [min(width, limit) for width in widths]


def _lines(cells: Sequence[str], widths: Sequence[int], layout: str) -> Iterator[str]:
    """The lines of a row: one, unless a cell is wider than its column."""
    text = "".join(cells)
    if text.isascii() and text.isprintable() and all(map(operator.le, map(len, cells), widths)):
        yield layout.format(*cells)  # a hundred thousand of these take no time
        return
    folded = [
        [cell] if cell_len(cell) <= width else chop_cells(cell, width)
        for cell, width in zip(map(_printable, cells), widths, strict=True)
    ]
    for line in itertools.zip_longest(*folded, fillvalue=""):
        yield layout.format(*(_Wide(cell) for cell in line))


class _Wide(str):
    """Text that is padded by the columns that it takes, not by its characters."""

    def __format__(self, how: str) -> str:
        return super().__format__(f"{how[0]}{int(how[1:]) - cell_len(self) + len(self)}")


def _printable(text: str) -> str:
    """No line break and no escape sequence: what a hostile file says must not reach the terminal."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


class TreeLines:
    """A tree of any length, drawn line by line: for each what leads to it, its name, and a remark, which is cut."""

    def __init__(self, lines: Callable[[], Iterable[tuple[str, str, str]]]) -> None:
        self._lines = lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        bold, dim = console.get_style("bold"), console.get_style("dim")
        for guide, name, remark in self._lines():
            yield Segment(guide + name, None if guide else bold)
            if remark:
                yield Segment("  " + shortened(remark, options.max_width - len(guide) - len(name) - 2), dim)
            yield Segment.line()


class HeatMapDrawing:
    """A heat map that takes the width, and the colours, that the console has when it is printed."""

    def __init__(self, heat: HeatMap) -> None:
        self._heat = heat

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        colours = console.color_system not in (None, "standard")  # sixteen colours have no shades
        from stackctl.render.heat_map import render_heat_map

        for line in render_heat_map(self._heat, options.max_width, colours=colours):
            yield Text.assemble(*line, no_wrap=True, overflow="ignore")


_NARROWEST = 24
"""Cells across which prose can still be read."""
_FRAME = 3
"""Cells that a column has besides: a line, and a space on either side."""


@dataclass(frozen=True)
class SideBySide:
    """Texts beside one another in columns of equal width, under a title; what does not fit beside stands below."""

    title: str
    columns: Sequence[str]
    cells: Sequence[str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        fitting = max(1, (options.max_width - 1) // (_NARROWEST + _FRAME))
        rows = math.ceil(len(self.columns) / fitting)
        beside = math.ceil(len(self.columns) / rows)  # three and two, not four and one
        yield Text(self.title, style="bold")
        for start in range(0, len(self.columns), beside):
            drawn = Table(box=box.ROUNDED, expand=True)
            for column in self.columns[start : start + beside]:
                drawn.add_column(Text(column), ratio=1, overflow="fold")
            drawn.add_row(
                *(Text(cell) if cell else Text("no text", "dim") for cell in self.cells[start : start + beside])
            )
            yield drawn
