"""The modules of a model as grids: layers across, kinds of module down. Pure: names to places."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_INDEX = re.compile(r"[0-9]{1,9}")

Cell = tuple[str, int]
"""A kind of module and the number of a layer."""


@dataclass(frozen=True, slots=True)
class GridPlace:
    """Where a module stands: ``model.layers.3.self_attn.q_proj`` is of kind ``self_attn.q_proj`` in layer 3 of the
    block ``model.layers``. Outside of layers there is no number, and the kind is the whole name.
    """

    block: str
    layer: int | None
    kind: str

    @property
    def name(self) -> str:
        """The layer's name, or the module's own outside of layers."""
        return self.kind if self.layer is None else f"{self.block}.{self.layer}".lstrip(".")


def grid_place(module: str) -> GridPlace:
    """A module's place by its name: the first number in it is that of a layer, and any later one, such as an
    expert's, is written ``*``, so that these share a place.
    """
    parts = module.split(".")
    index = next((i for i, part in enumerate(parts[:-1]) if _INDEX.fullmatch(part)), None)
    if index is None:
        return GridPlace("", None, module)
    kind = ("*" if _INDEX.fullmatch(part) else part for part in parts[index + 1 :])
    return GridPlace(".".join(parts[:index]), int(parts[index]), ".".join(kind))


@dataclass(frozen=True)
class Grid:
    """One block of layers (most models have one). ``cells`` are the modules at each place that has any."""

    block: str
    layers: tuple[int, ...]
    kinds: tuple[str, ...]
    cells: dict[Cell, list[str]]


def arrange(modules: Iterable[str]) -> tuple[list[Grid], list[str]]:
    """Modules as grids, and those outside of layers; kinds in the order in which they come, layers by number."""
    blocks: dict[str, dict[Cell, list[str]]] = {}
    outside = []
    for module in modules:
        where = grid_place(module)
        if where.layer is None:
            outside.append(module)
        else:
            blocks.setdefault(where.block, {}).setdefault((where.kind, where.layer), []).append(module)
    grids = [
        Grid(
            block, tuple(sorted({layer for _, layer in cells})), tuple(dict.fromkeys(kind for kind, _ in cells)), cells
        )
        for block, cells in blocks.items()
    ]
    return grids, outside


def short_names(kinds: Iterable[str]) -> dict[str, str]:
    """Each kind by as few of its last words as tell it from the others: ``q_proj``, but ``mlp.c_proj``."""
    kinds = list(kinds)
    short = {}
    for kind in kinds:
        parts = kind.split(".")
        endings = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        others = [other for other in kinds if other != kind]
        short[kind] = next((e for e in endings if not any(f".{other}".endswith(f".{e}") for other in others)), kind)
    return short
