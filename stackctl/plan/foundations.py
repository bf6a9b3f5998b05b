"""What members were trained on and is not beneath them in a stack, and the command that moves them. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from stackctl.core.expressions import format_term
from stackctl.plan.model import PlanMember, Problem


def missing_foundations(members: Sequence[PlanMember]) -> list[Problem]:
    """A warning where a member stands without what it was trained on, or on another version of it."""
    present = {
        m.adapter: format_term(m.label, m.weight) + (" weighted by layer" if m.layer_weights else "") for m in members
    }
    problems = []
    for member in members:
        for needed in member.trained_on if member.is_used else ():
            name = needed.partition("@")[0]
            if present.get(name) == needed:
                continue
            instead = f", here {present[name]} is" if name in present else ""
            problems.append(
                Problem(
                    "foundation",
                    f"{member.label} was trained on {needed}{instead or ', which is not in this stack'}",
                    _move(member, present)
                    + f"for what was trained, compose {'+'.join([*member.trained_on, member.label])}",
                    member.label,
                    "warning",
                )
            )
    return problems


def _move(member: PlanMember, present: Mapping[str, str]) -> str:
    """The command that moves a member onto what is beneath it here; nothing where some of that is missing."""
    below = [present.get(needed.partition("@")[0], " ") for needed in member.trained_on]
    if any(" " in term for term in below):  # not there, or weighted by layer, which nothing is trained on
        return ""
    data = shlex.quote(member.data) if member.data else "FILE"
    on = "+".join(below)
    return f"move it: stackctl train {member.adapter} --on {on} --from {member.label} --data {data}; "
