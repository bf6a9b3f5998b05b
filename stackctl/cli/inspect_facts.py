"""What ``inspect`` finds out about things, as data and as trees to draw. Headers only; tensors are the engine's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from stackctl.core.errors import Usage
from stackctl.core.expressions import format_weight
from stackctl.core.schema import Base
from stackctl.lora.checkpoint import INFO, Checkpoint
from stackctl.lora.lora_config import describe_lora
from stackctl.plan.methods import SUM
from stackctl.plan.stack_plan import Problem, StackPlan
from stackctl.registry.adapters import ResolvedMember
from stackctl.registry.resolve import ResolvedStack
from stackctl.registry.store import Registry
from stackctl.render.terminal import LABELS
from stackctl.storage.files import human_bytes, read_bounded

if TYPE_CHECKING:
    from rich.text import Text
    from rich.tree import Tree


def module_table(plan: StackPlan) -> list[dict[str, Any]]:
    """Per module: type, shape, rank of the sum, and every member's rank and scaling (weight not included)."""
    return [
        {
            "module": module.name,
            "type": module.type,
            "shape": list(module.shape),
            "rank": module.rank,
            "members": [
                {"member": plan.members[f.member].label, "rank": f.rank, "scaling": f.scaling} for f in module.factors
            ],
        }
        for module in plan.modules.values()
    ]


def row_table(plan: StackPlan) -> list[dict[str, Any]]:
    """Rows of single tokens: which member trained which, where."""
    return [
        {"member": plan.members[rows.member].label, "module": rows.module, "tokens": list(rows.tokens)}
        for rows in plan.token_rows
    ]


def base_info(base: Base) -> dict[str, Any]:
    """A base as ``inspect`` tells it."""
    return {"kind": "base", **{k: v for k, v in msgspec.to_builtins(base).items() if k not in ("schema", "kind")}}


def checkpoint_info(checkpoint: Checkpoint, plan: StackPlan) -> dict[str, Any]:
    """What a checkpoint says of itself, and which base of the registry, if any, it was checked with."""
    info: dict[str, Any] = {
        "kind": "checkpoint",
        "path": str(checkpoint.path.resolve()),
        "digest": checkpoint.digest(),
        "base": checkpoint.config.get("base_model_name_or_path"),
        "checked_on": plan.base.name if plan.base else None,
        "parameters": checkpoint.parameters,
        "dtype": checkpoint.dtype,
        "bytes": checkpoint.bytes,
        "rank": plan.rank,
        "modules": len(plan.modules),
        "token_rows": row_table(plan),
        "problems": [p.json() for p in plan.problems],
    }
    if checkpoint.is_lora:
        info["lora"] = msgspec.to_builtins(describe_lora(checkpoint.config))
    note = checkpoint.path / INFO
    if note.is_file():
        try:
            info["info"] = msgspec.json.decode(read_bounded(note))
        except (ValueError, Usage, msgspec.DecodeError, RecursionError):
            info["problems"].append(Problem("info", f"{INFO} is not valid JSON", severity="warning").json())
    return info


def adapter_info(member: ResolvedMember, plan: StackPlan, registry: Registry) -> dict[str, Any]:
    """An adapter version as ``inspect`` tells it."""
    version = member.version
    entry = msgspec.to_builtins(version)
    return {
        "kind": "adapter",
        "adapter": member.adapter.name,
        "description": member.adapter.description,
        **entry,
        "path": str(registry.weights_path(version)),
        "versions": [v.version for v in member.adapter.versions],
        "made_with": entry.get("versions", {}),
        "rank": plan.rank,
        "modules": len(plan.modules),
        "token_rows": row_table(plan),
        "needs": version.trained_on,
        "problems": [p.json() for p in plan.problems if p.code != "foundation"],
    }


def stack_info(stack: ResolvedStack, plan: StackPlan) -> dict[str, Any]:
    """A stack or an expression as ``inspect`` tells it."""
    return {
        "kind": "stack" if stack.name else "expression",
        "stack": stack.name or stack.text,
        "expression": stack.pinned,
        "base": stack.base.name,
        "method": plan.method,
        "exact": plan.method == SUM and not plan.errors,
        "rank": plan.rank,
        "modules": len(plan.modules),
        "token_rows": row_table(plan),
        "members": [
            {
                "layer_weights": {},
                **m.entry().json(),
                "rank": planned.rank,
                "trained_on": m.version.trained_on,
                "parameters": m.version.parameters,
                "path": str(planned.checkpoint.path),
            }
            for m, planned in zip(stack.members, plan.members, strict=True)
        ],
        "problems": [p.json() for p in plan.problems],
    }


def stack_tree(stack: ResolvedStack, plan: StackPlan, *, problems: bool = True) -> Tree:
    """A stack as a tree: the base at the root, members in order, what each was trained on, every problem."""
    shown = plan.problems if problems else ()
    from rich.text import Text
    from rich.tree import Tree

    base = stack.base
    tree = Tree(Text(f"{base.name}  {base.architecture}, {base.parameters / 1e6:,.0f} M parameters", style="bold"))
    for member, planned in zip(stack.members, plan.members, strict=True):
        version = member.version
        weight = "" if member.weight == 1 else f" × {format_weight(member.weight)}"
        if member.layer_weights:
            weight += f" ({len(member.layer_weights)} weights by layer)"
        size = f"{version.parameters:,} parameters, {human_bytes(version.bytes)}"
        branch = tree.add(Text(f"+ {member.label}{weight}  rank {planned.rank}, {size}"))
        if rows := {token for own in plan.token_rows if plan.members[own.member] is planned for token in own.tokens}:
            named = version.trained_tokens or [str(token) for token in sorted(rows)]
            branch.add(Text(f"rows of {', '.join(named)}", style="dim"))
        if version.trained_on:
            branch.add(Text(f"trained on {'+'.join(version.trained_on)}", style="dim"))
        for problem in shown:
            if problem.member == member.label:
                branch.add(_labelled(problem.severity, problem.message))
    for problem in shown:
        if problem.member is None:
            tree.add(_labelled(problem.severity, problem.message))
    return tree


def _labelled(label: str, message: str) -> Text:
    """What is said of a stack, with the label and the colour that it has everywhere else."""
    from rich.text import Text

    return Text.assemble((f"{label}:", f"bold {LABELS[label]}"), f" {message}")


def facts_tree(title: str, facts: dict[str, Any], problems: list[dict[str, Any]]) -> Tree:
    """Names and values under a title, then problems."""
    from rich.text import Text
    from rich.tree import Tree

    tree = Tree(Text(title, style="bold"))
    told = {name: _told(value) for name, value in facts.items() if value not in (None, "", [], {})}
    width = max(map(len, told), default=0)
    for name, value in told.items():
        tree.add(Text.assemble((f"{name:<{width}}  ", "dim"), value.replace("\n", "\n" + " " * (width + 2))))
    for problem in problems:
        branch = tree.add(_labelled(problem["severity"], problem["message"]))
        if problem["hint"]:
            branch.add(_labelled("hint", problem["hint"]))
    return tree


def _told(value: Any) -> str:
    """A value as a person reads it."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def looks_like_path(what: str) -> bool:
    """Whether a text can only be a folder."""
    return "/" in what or "\\" in what or what in (".", "..")
