"""What ``inspect`` measures of modules, as heat maps: the norms of deltas, and the cosines of a pair's. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stackctl.render.heatmap import Grid, HeatMap, arrange
from stackctl.render.interference import Overlap, Pair, pool

_FAINTEST = 0.1
"""The top of a map of cosines is at least this: two deltas that have nothing to do with each other shall not look like
a quarrel."""


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


def cosine_pictures(pairs: Sequence[Pair]) -> list[Picture]:
    """Where two members are against each other, for each of some pairs, all on one scale.

    To the right of each kind of module stand the cosine over all layers, and the mean overlaps of columns and rows.
    """
    return _on_one_scale([_cosine_picture(pair) for pair in pairs], _FAINTEST)


def _cosine_picture(pair: Pair) -> Picture:
    overlaps = {found.module: found.overlap for found in pair.modules}
    grids, outside = arrange(overlaps)
    maps = []
    for grid in grids:
        values = {cell: pool(overlaps[name] for name in names).cosine for cell, names in grid.cells.items()}
        told = [figures(pool(overlaps[name] for name in _modules(grid, kind))) for kind in grid.kinds]
        beside = {heading: [kind[heading] for kind in told] for heading in ("cosine", "columns", "rows")}
        maps.append(HeatMap(grid, values, 0.0, signed=True, beside=beside))
    lines = ((module, ", ".join(f"{k} {v}" for k, v in figures(overlaps[module]).items())) for module in outside)
    return Picture(pair.title, tuple(maps), tuple(lines))


def _modules(grid: Grid, kind: str) -> Iterable[str]:
    return (name for (k, _), names in grid.cells.items() if k == kind for name in names)


def _on_one_scale(pictures: Sequence[Picture], least: float) -> list[Picture]:
    """The same pictures with the largest number of all as the top of each."""
    values = [abs(value) for p in pictures for m in p.maps for value in m.values.values() if value is not None]
    top = max([least, *values])
    return [replace(p, maps=tuple(replace(heat, top=top) for heat in p.maps)) for p in pictures]


def figures(overlap: Overlap) -> dict[str, str]:
    """An overlap's numbers for a person; a dash where a delta is nought."""
    return {
        "cosine": "-" if overlap.cosine is None else signed(overlap.cosine, 3),
        "columns": "-" if overlap.columns is None else f"{overlap.columns:.2f}",
        "rows": "-" if overlap.rows is None else f"{overlap.rows:.2f}",
    }


def signed(value: float, digits: int) -> str:
    """A number with its sign, which nothing that rounds to nought has."""
    text = f"{value:+.{digits}f}"
    return text if float(text) else text[1:]
