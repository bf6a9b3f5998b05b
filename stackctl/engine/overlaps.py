"""How much the deltas of two members overlap, as numbers: module by module, by layer, as a whole. Pure.

``engine.interference`` measures them. Everything here follows from its numbers alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from stackctl.lora.module_grid import GridPlace, grid_place

MOST_OPPOSED = 3
K = TypeVar("K")


@dataclass(frozen=True, slots=True)
class Overlap:
    """Two deltas on one module, or on several together.

    ``norms`` are ‖ΔW₁‖ and ‖ΔW₂‖ with weights and scalings. ``cosine`` is ⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖ ‖ΔW₂‖), in [-1, 1]: below
    0 they are opposed. ``columns`` and ``rows`` say how much of the smaller of the two column spaces (what
    is written) and row spaces (what is read) lies in the larger one, in [0, 1]; ``column_chance`` and ``row_chance``
    how much would by chance. None where a delta is zero, which has no direction.
    """

    norms: tuple[float, float]
    cosine: float | None
    columns: float | None
    rows: float | None
    column_chance: float | None
    row_chance: float | None

    def json(self) -> dict[str, Any]:
        return asdict(self) | {"norms": list(self.norms)}


@dataclass(frozen=True, slots=True)
class ModuleOverlap:
    """Two deltas on one module; ``ranks`` are those that they really have."""

    module: str
    ranks: tuple[int, int]
    overlap: Overlap

    def json(self) -> dict[str, Any]:
        where = {"module": self.module, "layer": grid_place(self.module).name, "ranks": list(self.ranks)}
        return where | self.overlap.json()


@dataclass(frozen=True)
class PairOverlap:
    """Two members by their labels, the modules that both change, and how many only the one or the other does."""

    members: tuple[str, str]
    modules: tuple[ModuleOverlap, ...]
    unshared: tuple[int, int]

    @property
    def title(self) -> str:
        return " × ".join(self.members)

    @property
    def total(self) -> Overlap:
        return pool(found.overlap for found in self.modules)

    def pooled(self, key: Callable[[GridPlace], K | None]) -> dict[K, Overlap]:
        """Modules taken together by something of their place, such as its kind; None leaves a module out."""
        groups: dict[K, list[Overlap]] = {}
        for found in self.modules:
            if (name := key(grid_place(found.module))) is not None:
                groups.setdefault(name, []).append(found.overlap)
        return {name: pool(overlaps) for name, overlaps in groups.items()}

    @property
    def layers(self) -> dict[str, Overlap]:
        """By layer, and by module outside of layers."""
        return self.pooled(lambda where: where.name)

    @property
    def most_opposed(self) -> list[tuple[str, float]]:
        """The three layers with the lowest cosine, the lowest first. A layer's deltas count as one matrix, so that
        large modules weigh more than small ones."""
        cosines = [(name, found.cosine) for name, found in self.layers.items() if found.cosine is not None]
        return sorted(cosines, key=lambda pair: pair[1])[:MOST_OPPOSED]

    def json(self) -> dict[str, Any]:
        return {
            "members": list(self.members),
            **self.total.json(),
            "most_opposed": [{"layer": name, "cosine": cosine} for name, cosine in self.most_opposed],
            "layers": [{"layer": name, **found.json()} for name, found in self.layers.items()],
            "modules": [found.json() for found in self.modules],
            "unshared": list(self.unshared),
        }


@dataclass(frozen=True, slots=True)
class NotCompared:
    """What was left out, and why: a member, or something on one module of it."""

    member: str
    module: str | None
    why: str


@dataclass(frozen=True)
class Interference:
    """Every pair of a stack's members."""

    pairs: tuple[PairOverlap, ...]
    not_compared: tuple[NotCompared, ...]

    @property
    def most_opposed_first(self) -> list[PairOverlap]:
        """The pairs that have a module in common, the lowest cosine first and those without any last."""
        cosines = [(pair, pair.total.cosine) for pair in self.pairs if pair.modules]
        return [pair for pair, _ in sorted(cosines, key=lambda found: 1.0 if found[1] is None else found[1])]

    def json(self) -> dict[str, Any]:
        return {
            "pairs": [pair.json() for pair in self.pairs],
            "not_compared": [asdict(left) for left in self.not_compared],
        }


def pool(overlaps: Iterable[Overlap]) -> Overlap:
    """Modules taken together. Their deltas count as the blocks of one matrix, which gives norms and cosine; of the
    overlaps, and of what chance makes of them, the mean is taken."""
    found = list(overlaps)
    norms = (math.hypot(*(o.norms[0] for o in found)), math.hypot(*(o.norms[1] for o in found)))
    inner = math.fsum(o.cosine * o.norms[0] * o.norms[1] for o in found if o.cosine is not None)
    cosine = max(-1.0, min(1.0, inner / norms[0] / norms[1])) if all(norms) else None
    return Overlap(
        norms, cosine, _mean([o.columns for o in found]), _mean([o.rows for o in found]),
        _mean([o.column_chance for o in found]), _mean([o.row_chance for o in found]),
    )  # fmt: skip


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return math.fsum(there) / len(there) if there else None
