"""What a request may call its model: every expression of the registry on one base. Entries and headers only."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from stackctl.core.errors import Incompatible, NotFound, StackctlError, Usage
from stackctl.core.expressions import BASE, format_term, parse_expression
from stackctl.core.provenance import Run
from stackctl.core.schema import Base
from stackctl.plan.stack_plan import StackPlan
from stackctl.registry.base_entries import resolve_base
from stackctl.registry.checkpoint_files import check_digests
from stackctl.registry.planning import PlannedStack, plan_expressions, read_plan
from stackctl.registry.resolve import ResolvedStack, resolve_expression
from stackctl.registry.store import Registry

_KEPT = 256
"""Plans that are kept: one is some kilobytes, and takes some milliseconds to make."""
_JOINS = set("+:@")


@dataclass
class ModelNames:
    """The models of a server: the expressions on ``base``, those in ``first`` listed first."""

    registry: Registry
    base: Base
    first: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._plans: OrderedDict[tuple[Any, ...], StackPlan] = OrderedDict()

    def find(self, text: str) -> PlannedStack:
        """An expression as the registry has it now, its members' bytes checked to be those that were registered.

        Raises:
            NotFound: there is no such name.
            Usage, Incompatible, VerificationFailed: it cannot be stacked, or a member was changed.
        """
        with self._lock:
            if text and not _JOINS & set(text):
                try:
                    parse_expression(text)
                except Usage as error:
                    raise NotFound(f"there is no model '{text[:80]}'", hint="a model is an expression") from error
            stack = resolve_expression(self.registry, text, base=self.base.name if text == BASE else None)
            if stack.base.name != self.base.name or stack.base.fingerprint != self.base.fingerprint:
                raise Incompatible(
                    f"'{text}' has the base '{stack.base.name}', and this server runs '{self.base.name}'",
                    hint=f"stackctl serve --base {stack.base.name}",
                )
            check_digests(self.registry, stack.members)
            return PlannedStack(stack, self._plan(stack))

    def _plan(self, stack: ResolvedStack) -> StackPlan:
        key = (
            stack.method,
            repr(stack.options),
            *((m.version.digest, str(m), repr(m.layer_weights)) for m in stack.members),
        )
        if (plan := self._plans.get(key)) is None:
            plan = self._plans[key] = read_plan(self.registry, stack).check()
        self._plans.move_to_end(key)
        if len(self._plans) > _KEPT:
            self._plans.popitem(last=False)
        return plan

    def usual(self) -> str:
        """What is asked for first, most likely: the current stack, if it has this base, else the base alone."""
        current = self.registry.settings().current
        with contextlib.suppress(StackctlError):
            if current is not None and self.find(current):
                return current
        return BASE

    def listed(self) -> list[dict[str, Any]]:
        """The base, and every stack and adapter on it: ``id``, ``kind``, ``members`` (as ``name@version``, weight, and
        the losses of its training, in nats for a token, where they are known)."""
        with self._lock:
            adapters = list(self.registry.adapters())
            runs = {label: version.run for a in adapters for label, version in a.labelled().items()}
            current = self.registry.settings().current
            found = [self._row(BASE, "base", [])]
            for stack in self.registry.stacks():
                if stack.base == self.base.name:
                    members = [(m.label, m.weight) for m in stack.members]
                    found.append(self._row(stack.name, "stack", members))
            for adapter in adapters:
                newest = adapter.newest()
                if newest.base == self.base.name:
                    found.append(self._row(adapter.name, "adapter", [(f"{adapter.name}@{newest.version}", 1.0)]))
        known = {row["id"] for row in found}
        for text in self.first:
            if text not in known:
                with contextlib.suppress(StackctlError):
                    resolved, _ = self.find(text)
                    members = [(member.label, member.weight) for member in resolved.members]
                    found.append(self._row(text, "expression", members))
        found = [_complete(row, runs, current) for row in found]
        return sorted(
            found, key=lambda row: self.first.index(row["id"]) if row["id"] in self.first else len(self.first)
        )

    def described(self, text: str) -> dict[str, Any]:
        """One model, as it is listed; every other expression is one too.

        Raises:
            NotFound, Usage, Incompatible, VerificationFailed: as :meth:`find`.
        """
        stack, _ = self.find(text)
        if text == BASE:
            kind = "base"
        elif stack.name == text:
            kind = "stack"
        else:
            kind = "adapter" if [m.adapter.name for m in stack.members] == [text] else "expression"
        row = self._row(text, kind, [(member.label, member.weight) for member in stack.members])
        runs = {member.label: member.version.run for member in stack.members}
        return _complete(row, runs, self.registry.settings().current)

    def _row(self, name: str, kind: str, members: list[tuple[str, float]]) -> dict[str, Any]:
        return {
            "id": name, "object": "model", "created": 0, "owned_by": "stackctl", "kind": kind,
            "base": self.base.name, "expression": "+".join(format_term(*member) for member in members) or BASE,
            "members": [{"adapter": label, "weight": weight} for label, weight in members],
        }  # fmt: skip


def _complete(row: dict[str, Any], runs: dict[str, Run | None], current: str | None) -> dict[str, Any]:
    """A row with the losses of its members' training, by their labels, and whether it is the current stack."""
    for member in row["members"]:
        run = runs.get(member["adapter"])
        member["loss"], member["held_out_loss"] = (run.loss, run.eval_loss) if run else (None, None)
    return row | {"current": row["id"] == current}


def common_base(registry: Registry, what: list[str], base: str | None) -> tuple[Base, tuple[str, ...]]:
    """The base to serve, and the expressions that were named: of these, else of the current stack, else the only one.

    Raises:
        StackctlError: all that is wrong with them.
    """
    if what:
        return plan_expressions(registry, what, base)[0][0].base, tuple(what)
    current = registry.settings().current
    if base is None and current is not None:
        return resolve_expression(registry, current).base, ()
    return resolve_base(registry, base), ()
