"""Several expressions at once, on one base: what ``compare``, ``eval`` and ``demo`` start from."""

from __future__ import annotations

from collections.abc import Sequence

from stackctl.errors import Incompatible, StackctlError, raise_all
from stackctl.names import BASE
from stackctl.plan import StackPlan
from stackctl.registry import Registry, ResolvedStack


def resolve_all(
    registry: Registry, expressions: Sequence[str], base: str | None = None
) -> list[tuple[ResolvedStack, StackPlan]]:
    """Resolve and plan expressions that one loaded base shall serve; ``base`` among them means the others' base.

    Raises:
        StackctlError: everything that is wrong with them, at once.
    """
    problems: list[StackctlError] = []
    found: dict[int, tuple[ResolvedStack, StackPlan]] = {}

    def attempt(index: int, text: str, on: str | None) -> None:
        try:
            stack = registry.resolve(text, base=on)
            found[index] = (stack, registry.plan(stack).check())
        except StackctlError as error:
            problems.append(error)

    for index, text in enumerate(expressions):
        if text != BASE:
            attempt(index, text, base)
    common = base or next((stack.base.name for stack, _ in found.values()), None)
    for index, text in enumerate(expressions):
        if text == BASE:
            attempt(index, text, common)
    raise_all(problems)
    stacks = [found[index] for index in range(len(expressions))]
    if len({stack.base.name for stack, _ in stacks}) > 1:
        which = ", ".join(f"{stack.text} on {stack.base.name}" for stack, _ in stacks)
        raise Incompatible(f"they stand on different bases: {which}", hint="ask for stacks of one base at a time")
    return stacks
