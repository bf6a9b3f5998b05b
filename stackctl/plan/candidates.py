"""What ``compose --method best`` tries beside the sum: every method with a few settings, as data. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stackctl.core.expressions import format_weight
from stackctl.core.schema import MethodOptions
from stackctl.plan.methods import METHODS, SUM, check_method

_DENSITIES = {
    "ties": (0.2, 0.5, 1.0),
    "dare_linear": (0.5, 0.8),
    "dare_ties": (0.5, 0.8),
    "magnitude_prune": (0.2, 0.5),
    "knots_ties": (0.2, 0.5, 1.0),
    "core_ties": (0.2, 0.5, 1.0),
}
"""Shares that stay: those of the papers' own searches, few of them."""
_AVERAGES = ("ties", "dare_ties", "knots_ties", "core_ties")
"""Methods that average what agrees. Members that do not meet are left at one nth, so that n times the weights are tried
as well."""


@dataclass(frozen=True)
class Candidate:
    """A method with its options; every member's weights are multiplied by ``scale``."""

    method: str
    options: MethodOptions
    scale: float = 1.0

    @property
    def settings(self) -> str:
        """In words, without the seed, which all have in common."""
        said = [f"{key} {getattr(self.options, key)}" for key in ("rank", "density") if getattr(self.options, key)]
        return ", ".join([*said, *([f"weights × {format_weight(self.scale)}"] if self.scale != 1 else [])])


def candidates(members: int, rank: int, seed: int) -> list[Candidate]:
    """Every method but the sum, with a few settings.

    Args:
        members: how many have a weight other than zero.
        rank: that of their sum; half of it is what ``svd`` is cut to.
    """
    return [
        Candidate(method, options, scale)
        for method in METHODS
        if method != SUM
        for options in _settings(method, rank, seed)
        for scale in ((1.0, float(members)) if method in _AVERAGES and members > 1 else (1.0,))
    ]


def _settings(method: str, rank: int, seed: int) -> Iterator[MethodOptions]:
    takes = METHODS[method].options
    own = {"seed": seed} if "seed" in takes else {}
    if method in _DENSITIES:
        for density in _DENSITIES[method]:
            yield check_method(method, MethodOptions(density=density, **own))
    elif method == "svd":
        if rank > 1:
            yield MethodOptions(rank=rank // 2)
    else:
        yield check_method(method, MethodOptions(**own))
