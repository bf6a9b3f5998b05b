"""Which parts of a stack make it go wrong, found by switching parts off in halves. Pure: scores to parts.

A part is what one member does to one module; what a member brings whole, saved modules and biases, has no weight, so
that all of it is one part.

First each member is switched off, and the best of what is left says how good the stack could be. Then half of a
member's parts are switched off, and half of those that are left in question, until it is one: at most members + ⌈log₂
modules⌉ evaluations where there is a single culprit. That the stack is good without it is tried once more.

That a stack stays bad with some parts off clears all of them. That it turns good may be an accident, for nonsense
changes with every part: where no single one of them proves to be the culprit, the other half is looked at. Where no
part at all does, there are several: the members without which it is good, then their layers, then the modules of these,
as long as they are few.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from stackctl.lora.module_grid import grid_place
from stackctl.lora.target_modules import natural_order
from stackctl.plan.layer_weights import Weights
from stackctl.plan.stack_plan import StackPlan

WHOLE = ""
"""The module of a part that is all that a member brings whole."""


@dataclass(frozen=True, slots=True)
class StackPart:
    """A member's number, and a module's name or ``WHOLE``."""

    member: int
    module: str

    @property
    def layer(self) -> str:
        """The name of the layer that it stands in, or the module's own outside of layers."""
        return grid_place(self.module).name if self.module else WHOLE


def parts_of(plan: StackPlan) -> list[StackPart]:
    """Every part of a stack: member by member, in each layer by layer, and last what it brings whole."""
    found = {StackPart(factor.member, name) for name, module in plan.modules.items() for factor in module.factors}
    found |= {StackPart(rows.member, rows.module) for rows in plan.token_rows}
    found |= {StackPart(whole.member, WHOLE) for whole in plan.replacements}
    return sorted(found, key=lambda part: (part.member, part.module == WHOLE, natural_order(part.module)))


def switch_off(plan: StackPlan, off: Collection[StackPart]) -> StackPlan:
    """The plan without some of its parts."""
    modules = {}
    for name, module in plan.modules.items():
        kept = tuple(factor for factor in module.factors if StackPart(factor.member, name) not in off)
        if kept:
            modules[name] = replace(module, factors=kept)
    return replace(
        plan,
        modules=modules,
        token_rows=tuple(rows for rows in plan.token_rows if StackPart(rows.member, rows.module) not in off),
        replacements=tuple(whole for whole in plan.replacements if StackPart(whole.member, WHOLE) not in off),
    )


def weights_without(plan: StackPlan, off: Collection[StackPart]) -> list[Weights]:
    """The weights of each member that switch some parts off: zero on their modules.

    Those that a member brings whole are there unless its one weight is zero, and then every other module names its own.
    """
    made = []
    for number, member in enumerate(plan.members):
        weights = Weights.of(member.weight, member.layer_weights)
        own = [part for part in parts_of(plan) if part.member == number]
        kept = [part.module for part in own if part not in off]
        if own and not kept:
            made.append(Weights(0.0))
        elif StackPart(number, WHOLE) in off:
            made.append(Weights(0.0, {module: weights.at(module) for module in kept}))
        else:
            gone = {part.module: 0.0 for part in own if part in off}
            made.append(Weights(weights.weight, {**weights.by_name, **gone}))
    return made


Off = frozenset[StackPart]
_FEW = 6
"""Layers, or modules, of several culprits that are told apart; more of them are told by what they stand in."""
_PATIENCE = 6
"""So many times the evaluations that a single culprit takes are spent on the search for one."""


class Badness(Protocol):
    """How bad a stack is with some parts off."""

    def score(self, off: Off) -> float:
        """A number that is higher the worse it is; infinite where nothing sensible came out."""
        ...

    def threshold(self, off: Off) -> float | None:
        """The score from which on it is bad, if ``off`` shows how good it could be; None if that is no better."""
        ...


@dataclass(frozen=True)
class Found:
    """The parts without which a stack is good, none where it is not bad; how many evaluations it took to find them."""

    parts: tuple[StackPart, ...]
    evaluations: int


@dataclass
class _Scores:
    """Scores by what is off, each asked for once, and the threshold between bad and good."""

    badness: Badness
    known: dict[Off, float] = field(default_factory=dict)
    threshold: float = math.inf

    def of(self, off: Iterable[StackPart]) -> float:
        key = frozenset(off)
        if key not in self.known:
            self.known[key] = self.badness.score(key)
        return self.known[key]

    def is_good(self, off: Iterable[StackPart]) -> bool:
        return self.of(off) < self.threshold


def find_culprits(parts: Sequence[StackPart], badness: Badness) -> Found:
    """The parts that make a stack go wrong.

    Args:
        parts: all of them, members together and in each its layers together.
        badness: of the stack as it is, and of the base alone, it is asked besides the evaluations that are counted.
    """
    scores = _Scores(badness)
    scores.of(())
    scores.of(parts)
    ends = len(scores.known)
    members = _grouped(parts, lambda part: part.member)
    for own in members:
        scores.of(own)
    reference = min((off for off in scores.known if off), key=lambda off: (scores.known[off], len(off)))
    threshold = badness.threshold(reference)
    if threshold is None:
        return Found((), len(scores.known) - ends)
    scores.threshold = threshold
    for own in sorted(members, key=scores.of):
        most = len(scores.known) + _PATIENCE * math.ceil(math.log2(len(own)) + 1)
        if scores.is_good(own) and (single := _single(own, scores, most)):
            part, evaluations = single
            return Found((part,), evaluations - ends)
    culprits = list(min((own for own in members if scores.is_good(own)), key=scores.of, default=parts))
    levels: list[tuple[Callable[[StackPart], Hashable], int]] = [
        (lambda part: part.member, len(parts)),
        (lambda part: (part.member, part.layer), _FEW),
        (lambda part: part, _FEW),
    ]
    for level, most in levels:
        needed = _smallest(_grouped(culprits, level), scores.is_good, most)
        if needed is None:
            break
        culprits = needed
    return Found(tuple(culprits), len(scores.known) - ends)


def _single(parts: Sequence[StackPart], scores: _Scores, most: int) -> tuple[StackPart, int] | None:
    """The part among some without which alone it is good, and how much was known before it was tried; else None."""
    if len(parts) == 1:
        before = len(scores.known)
        return (parts[0], before) if scores.is_good(parts) else None
    if len(scores.known) >= most:
        return None
    middle = _middle(parts)
    if scores.is_good(parts[:middle]) and (found := _single(parts[:middle], scores, most)):
        return found
    return _single(parts[middle:], scores, most)


def _middle(parts: Sequence[StackPart]) -> int:
    """Where to halve: between layers if that costs no evaluation."""
    count = len(parts)
    most = 2 ** (math.ceil(math.log2(count)) - 1)  # parts that the evaluations that are left can tell apart
    between = range(max(1, count - most), min(most, count - 1) + 1)
    layers = [n for n in between if parts[n].layer != parts[n - 1].layer]
    return min(layers or [count // 2], key=lambda n: abs(2 * n - count))


def _grouped(parts: Sequence[StackPart], level: Callable[[StackPart], Hashable]) -> list[list[StackPart]]:
    groups: dict[Hashable, list[StackPart]] = {}
    for part in parts:
        groups.setdefault(level(part), []).append(part)
    return list(groups.values())


def _smallest(
    groups: Sequence[Sequence[StackPart]], good: Callable[[Iterable[StackPart]], bool], most: int
) -> list[StackPart] | None:
    """The parts of as few groups as make it good, none of which can be spared; None where they are more than ``most``.

    All groups together make it good. Each round finds the group with which it turns, which is needed whatever comes
    before it (Junker 2004, "QuickXplain", finds minimal conflicts alike).
    """
    needed: list[StackPart] = []
    high = len(groups)
    for _ in range(min(most, len(groups))):
        low = 0
        while high - low > 1:
            middle = (low + high) // 2
            off = [part for group in groups[:middle] for part in group]
            low, high = (low, middle) if good([*off, *needed]) else (middle, high)
        high -= 1
        needed = [*groups[high], *needed]
        if good(needed):
            return needed
    return None
