"""stackctl compose"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from stackctl.cli.common import PATH, BaseOption, Context, command, complete_what
from stackctl.names import format_term, parse_stack_name
from stackctl.output import Result
from stackctl.plan import StackPlan
from stackctl.registry import ResolvedStack


def register(app: typer.Typer) -> None:
    @command(app, "compose", example="stackctl compose style+instruct --name storyteller", panel=PATH)
    def compose(
        context: Context,
        expression: Annotated[
            str,
            typer.Argument(
                metavar="EXPR",
                help="Adapters joined by '+', with versions and weights: style:0.7+instruct@2.",
                autocompletion=complete_what,
                show_default=False,
            ),
        ],
        name: Annotated[str | None, typer.Option(help="What to call it; else its names joined by '+'.")] = None,
        base: BaseOption = None,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and show it; write nothing.")] = False,
    ) -> Result:
        """Write a stack: a recipe of pinned adapters and weights, no tensors. It becomes the current stack."""
        registry = context.registry
        if name is not None:
            parse_stack_name(name)
        stack = registry.resolve(expression, base=base)
        plan = registry.plan(stack).check()
        label = name or stack.name or stack.default_name
        if label == "base":
            label = parse_stack_name(label)  # says that the name is reserved
        if not dry_run:
            registry.save_stack(label, stack)
        data = {
            "stack": label,
            "base": stack.base.name,
            "members": members_json(stack, plan),
            "method": "sum",
            "exact": True,
            "rank": plan.rank,
            "problems": [p.json() for p in plan.problems],
            "dry_run": dry_run,
        }
        notes = (*stack.notes, *(f"{p.message}; {p.hint}" for p in plan.problems))
        return Result(data, label, lambda: _screen(label, stack, plan, dry_run), notes=notes)


def members_json(stack: ResolvedStack, plan: StackPlan) -> list[dict[str, Any]]:
    """A stack's members as JSON shows them."""
    return [
        {
            "adapter": member.adapter.name,
            "version": member.version.version,
            "digest": member.version.digest,
            "weight": member.weight,
            "rank": planned.rank,
        }
        for member, planned in zip(stack.members, plan.members, strict=True)
    ]


def _screen(label: str, stack: ResolvedStack, plan: StackPlan, dry_run: bool) -> Any:
    from rich.console import Group
    from rich.text import Text

    from stackctl.inspection import stack_tree

    terms = " + ".join(["W_base", *(format_term(f"ΔW_{m.adapter.name}", m.weight) for m in stack.members)])
    head = f"{'would compose' if dry_run else 'composed'} {label}: W = {terms}"
    foot = f"exact sum, rank {plan.rank} at most, {len(plan.modules)} modules"
    follow = "" if dry_run else '\nit is the current stack; next: stackctl generate -p "…"'
    return Group(Text(head), stack_tree(stack, plan), Text(foot + follow))
