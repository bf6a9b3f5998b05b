"""Tables, trees and panels as every command draws them. rich is imported here, and only when something is drawn."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from stackctl.heatmap import HeatMap, render_terminal

NUMERIC = {"parameters", "rank", "loss", "±", "perplexity", "accuracy", "tokens", "records", "weight", "size", "step"}


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str | None = None) -> Table:
    """A plain table: no frame, a rule under its head, numbers to the right."""
    drawn = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False, header_style="bold")
    for column in columns:
        drawn.add_column(column, justify="right" if column.strip() in NUMERIC else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return drawn


def side_by_side(title: str, columns: Sequence[str], cells: Sequence[str]) -> Table:
    """Texts beside one another in columns of equal width, under a title."""
    drawn = Table(box=box.ROUNDED, title=Text(title, style="bold"), title_justify="left", expand=True, show_lines=True)
    for column in columns:
        drawn.add_column(column, ratio=1, overflow="fold")
    drawn.add_row(*(Text(cell) for cell in cells))
    return drawn


class HeatMapDrawing:
    """A heat map that takes the width, and the colours, that the console has when it is printed."""

    def __init__(self, heat: HeatMap) -> None:
        self._heat = heat

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        colours = console.color_system not in (None, "standard")  # sixteen colours have no shades
        for line in render_terminal(self._heat, options.max_width, colours=colours):
            yield Text.assemble(*line, no_wrap=True, overflow="ignore")
