"""The parts of a stack that can be switched off, each alone: what one member does to one module. Pure: plans to plans.

What a member brings whole, saved modules and biases, has no weight, so that all of it is one part.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from stackctl.lora.module_grid import place
from stackctl.lora.target_modules import natural_order
from stackctl.plan.layer_weights import Weights
from stackctl.plan.model import StackPlan

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
        return place(self.module).name if self.module else WHOLE


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
