"""Resolved stacks to plans, from entries and the headers of checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from stackctl.core.errors import Incompatible, NotFound, StackctlError, VerificationFailed, gathering, raise_all
from stackctl.core.expressions import BASE
from stackctl.lora.checkpoint import read_checkpoint
from stackctl.plan.build import plan_stack
from stackctl.plan.stack_plan import PlanMember, StackPlan
from stackctl.registry.adapters import ResolvedMember
from stackctl.registry.checkpoint_files import check_digests
from stackctl.registry.resolve import ResolvedStack, resolve_expression
from stackctl.registry.store import Registry


class PlannedStack(NamedTuple):
    """A resolved stack, and what it is module by module."""

    stack: ResolvedStack
    plan: StackPlan

    def changed(self, stack: ResolvedStack) -> PlannedStack:
        """The same adapters with other weights, or put together by another method; no header is read again.

        Raises:
            Incompatible, VerificationFailed: they cannot be.
        """
        members = [
            replace(known, weight=member.weight, layer_weights=member.layer_weights)
            for known, member in zip(self.plan.members, stack.members, strict=True)
        ]
        return PlannedStack(stack, plan_stack(stack.base, members, stack.method, stack.options).check())


def read_plan(registry: Registry, stack: ResolvedStack) -> StackPlan:
    """The plan of a resolved stack, from its entries and its members' headers.

    Raises:
        NotFound, Incompatible, VerificationFailed: a checkpoint is missing, changed, or cannot be read.
    """
    try:
        members = [plan_member(registry, member) for member in stack.members]
        plan = plan_stack(stack.base, members, stack.method, stack.options)
    except (NotFound, Incompatible, VerificationFailed):
        check_digests(registry, stack.members)  # a file that was changed is the cause, whatever it led to
        raise
    if plan.errors:
        check_digests(registry, stack.members)
    return plan


def plan_member(registry: Registry, member: ResolvedMember) -> PlanMember:
    """A member with the header of its checkpoint."""
    version = member.version
    return PlanMember(
        label=member.label, weight=member.weight, checkpoint=read_checkpoint(registry.weights_path(version)),
        adapter=member.adapter.name, version=version.version, digest=version.digest, base=version.base,
        fingerprint=version.fingerprint, trained_on=tuple(version.trained_on), layer_weights=member.layer_weights,
        recorded=version.problems, data=version.data.path if version.data else "",
    )  # fmt: skip


def plan_expression(
    registry: Registry, text: str | None, *, base: str | None = None, fresh: bool = False
) -> PlannedStack:
    """Find everything that an expression names, and plan it; None means the current stack.

    Raises:
        StackctlError: see :func:`resolve_expression` and :func:`read_plan`, or something stands in the way of the plan.
    """
    stack = resolve_expression(registry, text, base=base, fresh=fresh)
    return PlannedStack(stack, read_plan(registry, stack).check())


def plan_expressions(registry: Registry, expressions: Sequence[str], base: str | None = None) -> list[PlannedStack]:
    """Resolve and plan expressions that one loaded base shall serve; ``base`` among them means the others' base.

    Raises:
        StackctlError: everything that is wrong with them, at once.
    """
    problems: list[StackctlError] = []
    found: dict[int, PlannedStack] = {}
    for index, text in sorted(enumerate(expressions), key=lambda place: place[1] == BASE):  # once the others' is known
        others = next((stack.base.name for stack, _ in found.values()), None) if text == BASE else None
        with gathering(problems):
            found[index] = plan_expression(registry, text, base=base or others)
    raise_all(problems)
    stacks = [found[index] for index in range(len(expressions))]
    if len({stack.base.name for stack, _ in stacks}) > 1:
        which = ", ".join(f"{stack.text} on {stack.base.name}" for stack, _ in stacks)
        raise Incompatible(f"they have different bases: {which}", hint="ask for stacks of one base at a time")
    return stacks
