"""Tables, trees and panels as every command draws them. rich is imported here, and only when something is drawn."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

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
