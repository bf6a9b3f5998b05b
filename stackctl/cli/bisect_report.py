"""What ``bisect`` found, as JSON and in words. No tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stackctl.core import NOISE
from stackctl.plan.bisection import StackPart
from stackctl.plan.stack_plan import StackPlan


def culprits_json(plan: StackPlan, parts: Sequence[StackPart]) -> list[dict[str, Any]]:
    """Culprits by member: the layers that they stand in, and the module where it is one; null where it is all."""
    found = []
    for number in dict.fromkeys(part.member for part in parts):
        own = [part for part in parts if part.member == number]
        modules = [part.module for part in own if part.module]
        layers = list(dict.fromkeys(part.layer for part in own if part.layer and part.layer != part.module))
        found.append(
            {
                "member": plan.members[number].label,
                "layers": layers,
                "module": modules[0] if len(own) == 1 and modules else None,
                "modules": modules,
            }
        )
    return found


def culprit_notes(document: dict[str, Any], name: str | None) -> list[str]:
    """What a person should know besides: several culprits, chance, what the expression leaves out."""
    culprits, typed, notes = document["culprits"], document["without"], []
    if sum(len(one["modules"]) for one in culprits) > 1:
        notes.append("no single module is the culprit: it is right only without all of these")
    if (chance := document["results"]["without"].get("p_value") or 0.0) > NOISE:
        notes.append(f"the loss is lower without it, but by so few records that it may be chance (p = {chance:.2g})")
    if name is None and typed is None:
        notes.append(f"no expression says '{document['stack']}' without it: --name N writes that stack")
    elif name is None:
        members = " and ".join(one["member"] for one in culprits)
        notes.append(f"{typed} leaves out all of {members}; --name N writes a stack without the culprit alone")
    return notes


def culprit_screen(document: dict[str, Any], name: str | None) -> Any:
    from rich.text import Text

    from stackctl.render.tables import spaced, table

    rows = [
        [one["member"], ", ".join(one["layers"]) or "-", one["module"] or f"{len(one['modules'])} modules"]
        for one in document["culprits"]
    ]
    lines = [f"found in {document['evaluations']} evaluations besides the stack as it is and the base alone"]
    for what, seen in document["results"].items():
        told = f"loss {seen['loss']}" if "loss" in seen else repr(seen["text"].strip()[:200])
        if "loss" in seen and seen["loss"] is not None:
            told = f"loss {seen['loss']:.4f}"
        lines.append(f"{what}: {told}" + ("" if seen.get("finite", True) else ", logits that are not numbers"))
    if name:
        lines.append(f"{name} is the stack without it, and the current one")
    elif document["without"]:
        lines.append(f'without it: stackctl generate {document["without"]} -p "…"')
    return spaced([table(["culprit", "layers", "module"], rows), Text("\n".join(lines))])
