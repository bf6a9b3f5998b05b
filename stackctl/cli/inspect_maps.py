"""The maps of ``stackctl inspect``: the norms of deltas by layer and module, and the cosines of pairs of members.

``--weights`` and ``--interference`` show them on a terminal; a page draws the same maps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from stackctl.lora.module_grid import arrange
from stackctl.render.heat_map import HeatMap
from stackctl.render.terminal import signed

if TYPE_CHECKING:
    from stackctl.engine.overlaps import Interference, NotCompared, Overlap, PairOverlap

_FAINTEST = 0.1
"""The top of a map of cosines is at least this: two deltas that have nothing to do with each other shall not look
opposed."""


@dataclass(frozen=True)
class Picture:
    """A map for each block of layers under a title, and what there is to say of each module outside of layers."""

    title: str
    maps: tuple[HeatMap, ...]
    outside: tuple[tuple[str, str], ...]


def norm_pictures(rows: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """‖ΔW‖ of a stack, and of each member where there are several, all on one scale.

    ``rows`` are those of ``inspect --weights``. To the right of each kind of module stands the norm over all layers.
    """
    members = list(dict.fromkeys(label for row in rows for label in row["members"]))
    wanted = {"the sum": {row["module"]: float(row["norm"]) for row in rows}} if len(members) > 1 else {}
    for label in members:
        wanted[label] = {row["module"]: float(row["members"][label]) for row in rows if label in row["members"]}
    return _on_one_scale([_norm_picture(f"‖ΔW‖ of {title}", norms) for title, norms in wanted.items()], 0.0)


def _norm_picture(title: str, norms: Mapping[str, float]) -> Picture:
    grids, outside = arrange(norms)
    maps = []
    for grid in grids:
        values = {cell: math.hypot(*(norms[name] for name in names)) for cell, names in grid.cells.items()}
        overall = [math.hypot(*(value for (k, _), value in values.items() if k == kind)) for kind in grid.kinds]
        maps.append(HeatMap(grid, values, 0.0, beside={"all": [f"{value:.3g}" for value in overall]}))
    return Picture(title, tuple(maps), tuple((module, f"{norms[module]:.3g}") for module in outside))


def cosine_pictures(pairs: Sequence[PairOverlap]) -> list[Picture]:
    """Where two members are opposed, for each of some pairs, all on one scale.

    To the right of each kind of module stand the cosine over all layers, and the mean overlaps of columns and rows.
    """
    return _on_one_scale([_cosine_picture(pair) for pair in pairs], _FAINTEST)


def _cosine_picture(pair: PairOverlap) -> Picture:
    overlaps = {found.module: found.overlap for found in pair.modules}
    cells = pair.pooled(lambda at: (at.block, at.kind, at.layer))
    kinds = pair.pooled(lambda at: (at.block, at.kind))
    grids, outside = arrange(overlaps)
    maps = []
    for grid in grids:
        values = {(kind, layer): cells[grid.block, kind, layer].cosine for kind, layer in grid.cells}
        told = [figures(kinds[grid.block, kind]) for kind in grid.kinds]
        beside = {heading: [kind[heading] for kind in told] for heading in ("cosine", "columns", "rows")}
        maps.append(HeatMap(grid, values, 0.0, signed=True, beside=beside))
    lines = ((module, ", ".join(f"{k} {v}" for k, v in figures(overlaps[module]).items())) for module in outside)
    return Picture(pair.title, tuple(maps), tuple(lines))


def _on_one_scale(pictures: Sequence[Picture], least: float) -> list[Picture]:
    """The same pictures with the largest number of all as the top of each."""
    values = [abs(value) for p in pictures for m in p.maps for value in m.values.values() if value is not None]
    top = max([least, *values])
    return [replace(p, maps=tuple(replace(heat, top=top) for heat in p.maps)) for p in pictures]


def figures(overlap: Overlap) -> dict[str, str]:
    """An overlap's numbers for a person; a dash where a delta is zero."""
    return {
        "cosine": "-" if overlap.cosine is None else signed(overlap.cosine, 3),
        "columns": "-" if overlap.columns is None else f"{overlap.columns:.2f}",
        "rows": "-" if overlap.rows is None else f"{overlap.rows:.2f}",
    }


# -- on a terminal -----------------------------------------------------------------------------------------------------

_MOST_MAPS = 3
"""Pairs whose maps are drawn: those with the lowest cosines. The table has all."""


def weights_screen(rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    """‖ΔW‖, a map for the sum and one for each member."""
    return [part for picture in norm_pictures(rows) for part in _picture(picture)]


def interference_screen(found: Interference) -> list[Any]:
    """A line for each pair, maps of the most opposed pairs, and what was not compared."""
    from rich.text import Text

    from stackctl.render.tables import table

    parts: list[Any] = []
    pairs = [pair for pair in found.pairs if pair.modules]
    if pairs:
        rows = [_row(pair) for pair in pairs]
        parts.append(Text("\ninterference", style="bold"))
        parts.append(table(["pair", "cosine", "columns", "rows", "most opposed in layer"], rows))
        parts.append(_EXPLAINED)
        for picture in cosine_pictures(found.most_opposed_first[:_MOST_MAPS]):
            parts += _picture(picture)
        if len(pairs) > _MOST_MAPS:
            parts.append(f"maps of the {_MOST_MAPS} most opposed pairs; --output page.html has more")
    parts += [f"{pair.title}: no module that both change" for pair in found.pairs if not pair.modules]
    return [*parts, *_left_out(found.not_compared)]


_EXPLAINED = (
    "cosine: -1 opposed, 0 unrelated, +1 aligned. columns, rows: the share of one member's output and input subspace "
    "that lies in the other's; after the slash, the share expected by chance."
)


def _row(pair: PairOverlap) -> list[str]:
    total = pair.total
    told = figures(total)
    chance = {"columns": total.column_chance, "rows": total.row_chance}
    spaces = [told[name] + (f"/{by:.2f}" if by is not None else "") for name, by in chance.items()]
    worst = ", ".join(f"{_short(layer)} {signed(cosine, 2)}" for layer, cosine in pair.most_opposed)
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
