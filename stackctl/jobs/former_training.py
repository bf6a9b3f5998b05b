"""What an adapter was trained on and with, where a job has it otherwise; by entries and headers alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import msgspec

from stackctl.core.errors import NotFound, StackctlError, Usage
from stackctl.core.schema import AdapterVersion, Base
from stackctl.core.train_job import TrainSettings
from stackctl.jobs.trained_tokens import parse_tokens
from stackctl.lora.target_modules import parse_targets
from stackctl.plan.build import plan_stack
from stackctl.plan.stack_plan import PlanMember, StackPlan
from stackctl.registry.adapters import ResolvedMember, foundations, resolve_kept
from stackctl.registry.planning import plan_member, read_plan
from stackctl.registry.resolve import ResolvedStack
from stackctl.registry.store import Registry


@dataclass(frozen=True)
class Former:
    """Where an adapter stood before.

    ``plan`` is that stack with the adapter on top, on its ``base``. ``changed`` is that stack less the job's, on the
    job's base: what it does no more; None where not just versions or weights beneath the adapter are others.
    """

    base: Base
    plan: StackPlan
    changed: StackPlan | None


def members_beneath(registry: Registry, version: AdapterVersion) -> list[ResolvedMember]:
    """The frozen stack that a version was trained on; removed ones too, as long as their weights are there.

    Raises:
        NotFound: one of them is gone.
    """
    return [replace(resolve_kept(registry, term.reference), weight=term.weight) for term in foundations(version)]


def stands_on(registry: Registry, version: AdapterVersion, stack: ResolvedStack) -> bool:
    """Whether a version was trained on just this stack, by the digests of its members, their weights and the base."""
    try:
        below = [(member.version.digest, member.weight) for member in members_beneath(registry, version)]
    except NotFound:
        return False
    now = [(member.version.digest, member.weight) for member in stack.members]
    return version.fingerprint == stack.base.fingerprint and sorted(below) == sorted(now)


def find_former(registry: Registry, member: ResolvedMember, stack: ResolvedStack) -> Former | str | None:
    """Where an adapter that a job begins at stood before; None if on just this, and else why nobody can tell."""
    version = member.version
    if stands_on(registry, version, stack):
        return None
    base = registry.find_base(version.base)
    if base is None or base.fingerprint != version.fingerprint:
        return f"the base '{version.base}' is not here as it was"
    if base.vocabulary_size != stack.base.vocabulary_size:
        return f"'{base.name}' has a vocabulary of {base.vocabulary_size:,}, not of {stack.base.vocabulary_size:,}"
    try:
        below = members_beneath(registry, version)
        former = ResolvedStack(member.label, base, (*below, member))
        return Former(base, read_plan(registry, former).check(), _changed(registry, below, stack, version))
    except StackctlError as error:
        return error.message


def _changed(
    registry: Registry, below: list[ResolvedMember], stack: ResolvedStack, version: AdapterVersion
) -> StackPlan | None:
    """The former stack less the one of now, where both are of the same adapters on one base."""
    names = [sorted(member.adapter.name for member in members) for members in (below, stack.members)]
    if names[0] != names[1] or not below or version.fingerprint != stack.base.fingerprint:
        return None
    members: dict[str, PlanMember] = {}
    for sign, one in [*((1, one) for one in below), *((-1, one) for one in stack.members)]:
        planned = members.get(one.version.digest) or replace(plan_member(registry, one), weight=0.0)
        members[one.version.digest] = replace(
            planned, adapter=one.version.digest, weight=planned.weight + sign * one.weight, trained_on=()
        )
    plan = plan_stack(stack.base, [member for member in members.values() if member.weight])
    return plan if plan.modules and not plan.errors else None


def settings_of(name: str, version: AdapterVersion) -> TrainSettings:
    """The settings that a version was trained with; what its entry leaves out was at its default.

    Raises:
        Usage: they are none.
    """
    told = {key: value for key, value in (version.settings or {}).items() if key in TrainSettings.__struct_fields__}
    try:
        return msgspec.convert(told, TrainSettings)
    except msgspec.ValidationError as error:
        raise Usage(
            f"the settings of {name}@{version.version} cannot be read: {error}",
            hint=f"fix adapters/{name}.yaml in the registry",
        ) from None


def comparable_settings(settings: TrainSettings, *, watched: bool = True) -> dict[str, Any]:
    """Settings in a form that is equal where training makes the same of them; ``watched``: on held-out records."""
    told: dict[str, Any] = msgspec.to_builtins(settings)
    targets = parse_targets(told["target_modules"])
    told["target_modules"] = sorted(targets) if isinstance(targets, list) else targets
    tokens = parse_tokens(told["train_tokens"])
    told["train_tokens"] = sorted(tokens) if isinstance(tokens, list) else tokens
    told["alpha"] = told["alpha"] if told["alpha"] is not None else 2 * told["rank"]
    ignored = () if watched else ("eval_steps", "keep", "patience")
    return {key: value for key, value in told.items() if key not in ignored}
