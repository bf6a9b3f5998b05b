"""The maps of ``stackctl inspect`` on a terminal: ``--weights`` and ``--interference``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stackctl.render.interference import Interference, NotCompared, Pair
from stackctl.render.module_maps import Picture, cosine_pictures, figures, norm_pictures, signed

_MOST_MAPS = 3
"""Pairs whose maps are drawn: those with the lowest cosines. The table has all."""


def weights_screen(rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    """‖ΔW‖, a map for the sum and one for each member."""
    return [part for picture in norm_pictures(rows) for part in _picture(picture)]


def interference_screen(found: Interference) -> list[Any]:
    """A line for each pair, maps of those that quarrel most, and what was not compared."""
    from rich.text import Text

    from stackctl.render.tables import table

    parts: list[Any] = []
    pairs = [pair for pair in found.pairs if pair.modules]
    if pairs:
        rows = [_row(pair) for pair in pairs]
        parts.append(Text("\ninterference", style="bold"))
        parts.append(table(["pair", "cosine", "columns", "rows", "quarrel most in layer"], rows))
        parts.append(_EXPLAINED)
        for picture in cosine_pictures(found.quarrelling[:_MOST_MAPS]):
            parts += _picture(picture)
        if len(pairs) > _MOST_MAPS:
            parts.append(f"maps of the {_MOST_MAPS} pairs that quarrel most; --output page.html has more")
    parts += [f"{pair.title}: no module that both change" for pair in found.pairs if not pair.modules]
    return [*parts, *_left_out(found.not_compared)]


_EXPLAINED = (
    "cosine: -1 against each other, 0 neither, +1 alike. columns, rows: how much of what the one writes and reads lies "
    "in what the other does, and after the stroke how much by chance."
)


def _row(pair: Pair) -> list[str]:
    total = pair.total
    told = figures(total)
    chance = {"columns": total.column_chance, "rows": total.row_chance}
    spaces = [told[name] + (f"/{by:.2f}" if by is not None else "") for name, by in chance.items()]
    worst = ", ".join(f"{_short(layer)} {signed(cosine, 2)}" for layer, cosine in pair.quarrels)
    return ["\n× ".join(pair.members), told["cosine"], *spaces, worst]


def _short(layer: str) -> str:
    """A layer by its number, which is what a map has above it; a module outside of layers by its name."""
    last = layer.rpartition(".")[2]
    return last if last.isdecimal() else layer


def _left_out(not_compared: Sequence[NotCompared]) -> list[str]:
    """Members that were left out, and how many parameters were for each reason."""
    lines = [f"not compared: {left.why}" for left in not_compared if left.module is None]
    counts: dict[tuple[str, str], list[str]] = {}
    for left in not_compared:
        if left.module is not None:
            counts.setdefault((left.member, left.why), []).append(left.module)
    for (member, why), modules in counts.items():
        more = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
        lines.append(f"not compared: {modules[0]}{more} of {member}: {why}")
    return lines


def _picture(picture: Picture) -> list[Any]:
    from rich.text import Text

    from stackctl.render.tables import HeatMapDrawing

    parts: list[Any] = []
    for heat in picture.maps:
        block = f", {heat.grid.block}" if len(picture.maps) > 1 else ""
        parts += [Text(f"\n{picture.title}{block}", style="bold"), HeatMapDrawing(heat)]
    if picture.outside and not picture.maps:
        parts.append(Text(f"\n{picture.title}", style="bold"))
    return [*parts, *(Text(f"{module}  {told}") for module, told in picture.outside)]
