"""Texts side by side on a terminal. rich is imported here, and only when something is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

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
