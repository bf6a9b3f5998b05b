"""stackctl compose"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import msgspec
import typer

from stackctl.cli.best_method import best_stack, best_table
from stackctl.cli.command import TRAIN, Context, command
from stackctl.cli.fit_weights import Chosen, FitRequest, fit_lines, fit_stack
from stackctl.cli.progress import share_progress
from stackctl.cli.shared_options import BaseOption, expression, typed_text
from stackctl.cli.sweep_table import sweep_page, sweep_screen
from stackctl.cli.sweep_weights import SweepRequest, Swept, sweep_stack
from stackctl.cli.weight_options import WeightOptions
from stackctl.core.errors import Usage
from stackctl.core.expressions import format_sum, parse_stack_name
from stackctl.core.library_messages import explain_option
from stackctl.core.schema import MethodOptions
from stackctl.plan.methods import BEST, DEFAULTS, METHODS, SUM, check_method
from stackctl.plan.stack_plan import StackPlan
from stackctl.registry.checkpoint_files import check_digests
from stackctl.registry.planning import PlannedStack, read_plan
from stackctl.registry.resolve import ResolvedStack, resolve_expression
from stackctl.registry.stacks import check_stack_name, save_stack
from stackctl.render import html as pages
from stackctl.render.output import Result

_of_method = partial(typer.Option, rich_help_panel="The method")
_EXAMPLES = """\
stackctl compose style:0.7+instruct@2
stackctl compose style+instruct+tone --method ties --density 0.3
stackctl compose style+instruct --sweep style=0:1.5:0.25 --data heldout.jsonl
stackctl compose style+instruct --fit chat.jsonl --per layer --name storyteller
stackctl compose style+instruct+tone --method best --data chat.jsonl"""


def _of(option: str) -> str:
    """Which methods take an option, for the help."""
    return "Of " + ", ".join(name for name, method in METHODS.items() if option in method.options)


@dataclass(frozen=True)
class _MethodChoice:
    """How the members are put together; each field is an option, with its help."""

    method: Annotated[
        str,
        _of_method(
            help=f"{', '.join(METHODS)}; best tries all of them, with --data.", autocompletion=lambda: [*METHODS, BEST]
        ),
    ] = SUM
    rank: Annotated[
        str | None,
        _of_method(parser=typed_text, help=f"{_of('rank')}: the rank to cut to; of svd also auto, with --tolerance."),
    ] = None
    tolerance: Annotated[
        float | None, _of_method(help=f"{_of('tolerance')}, with --rank auto: the relative error allowed.")
    ] = None
    density: Annotated[
        float | None,
        _of_method(
            help=f"{_of('density')}: the share of entries that are kept.", show_default=str(DEFAULTS["density"])
        ),
    ] = None
    seed: Annotated[
        int | None,
        _of_method(
            help=f"{_of('seed')}: the seed of the random drop. With --fit or --method best: of the split into learned "
            "and held-out records.",
            show_default=str(DEFAULTS["seed"]),
        ),
    ] = None

    def options(self, request: FitRequest | SweepRequest | None) -> tuple[str, MethodOptions]:
        """The method that it begins with, and its options.

        Raises:
            Usage: one is out of range, the method does not take it, or it is not one whose weights are learned.
        """
        typed: dict[str, Any] = {"rank": self.rank, "tolerance": self.tolerance, "density": self.density}
        if self.method == BEST:
            if given := ", ".join(f"--{name}" for name, value in typed.items() if value is not None):
                raise Usage(
                    f"--method best tries settings of its own, and {given} was given", hint=f"leave out {given}"
                )
            return SUM, check_method(SUM, MethodOptions())
        if isinstance(request, FitRequest) and self.method != SUM:
            raise Usage(f"--fit learns the weights of a sum, and not of {self.method}", hint="leave out --method")
        if self.rank is not None and self.rank.isascii() and self.rank.isdigit():
            typed["rank"] = int(self.rank)
        typed["seed"] = None if isinstance(request, FitRequest) else self.seed
        try:
            options = msgspec.convert({key: value for key, value in typed.items() if value is not None}, MethodOptions)
        except msgspec.ValidationError as error:
            raise Usage(explain_option(error, MethodOptions), hint="stackctl compose --help") from None
        return self.method, check_method(self.method, options)


@command("compose", example=_EXAMPLES, panel=TRAIN)
def compose(
    context: Context,
    expression: Annotated[
        str, expression(metavar="EXPR", help="Adapters joined by '+', with versions and weights: style:0.7+instruct@2.")
    ],
    name: Annotated[
        str | None, typer.Option(help="Name of the stack; by default its members' names joined by '+'.")
    ] = None,
    *,
    choice: _MethodChoice,
    weights: WeightOptions,
    base: BaseOption = None,
    dry_run: Annotated[bool, typer.Option(help="Check and show the stack without writing it.")] = False,
) -> Result:
    """Write a stack: a recipe of pinned adapters and weights, no tensors. It becomes the current stack."""
    registry = context.registry
    if name is not None:
        parse_stack_name(name)
    tries_all = choice.method == BEST
    request = weights.request(choice.seed, best=tries_all)
    method, options = choice.options(request)
    stack = replace(resolve_expression(registry, expression, base=base, fresh=True), method=method, options=options)
    planned = PlannedStack(stack, read_plan(registry, stack).check())
    check_digests(registry, stack.members)
    if isinstance(request, SweepRequest):
        if name is not None:
            check_stack_name(registry, name, stack)
        return _swept(context, sweep_stack(context, planned, request), request, None if dry_run else name)
    label = name or stack.name or stack.default_name
    if label == "base":
        label = parse_stack_name(label)  # says that the name is reserved
    chosen = Chosen(planned, {}, [])
    if request is not None or dry_run:  # before minutes of work, and what a dry run says can be done
        check_stack_name(registry, label, stack)
    if request is not None:
        chosen = (best_stack if tries_all else fit_stack)(context, planned, request)
    stack, plan = chosen.planned
    if not dry_run:
        save_stack(registry, label, stack)
    data = {
        **_recipe_json(label, chosen.planned),
        "exact": stack.method == SUM,
        "rank": plan.rank,
        **_measured(context, plan),
        **chosen.json,
        "problems": [p.json() for p in plan.problems],
        "dry_run": dry_run,
    }
    notes = (*stack.notes, *(f"{p.message}; {p.hint}" for p in plan.problems), *chosen.notes)
    return Result(data, label, lambda: _screen(data, stack, plan), notes=notes)


def _swept(context: Context, swept: Swept, request: SweepRequest, name: str | None) -> Result:
    """The losses over a grid; the best of it becomes a stack where a name was given for it."""
    registry, stack = context.registry, swept.planned.stack
    if request.page is not None:
        title = f"{stack.default_name}: {' and '.join(axis.name for axis in swept.axes)}"
        pages.write_page(request.page, sweep_page(swept, title, stack.base.name, stack.method))
    if name is not None:
        save_stack(registry, name, stack)
    data = {
        **_recipe_json(name, swept.planned),
        "expression": stack.typed,
        "sweep": swept.rows,
        "best": swept.best,
        "trade_off": swept.trade_off,
        "path": str(request.page.absolute()) if request.page else None,
    }
    after = f"{name} has these weights and is the current stack" if name else "nothing was written; --name N writes it"
    said = [after, *([f"wrote the page to {request.page}"] if request.page else [])]
    return Result(
        data,
        name or stack.typed or stack.pinned,
        lambda: _sweep_screen(swept, said),
        notes=(*stack.notes, *swept.notes),
    )


def _sweep_screen(swept: Swept, said: list[str]) -> Any:
    from rich.console import Group
    from rich.text import Text

    return Group(sweep_screen(swept), *map(Text, said))


def _measured(context: Context, plan: StackPlan) -> dict[str, Any]:
    """How far a method that is not the exact sum is from it; this one reads the tensors."""
    if plan.method == SUM:
        return {}
    from stackctl.engine.merging import measure

    with share_progress(context.output, f"merging by {plan.method}") as progress:
        found = measure(plan, progress)
    return {
        "rank": found.rank,
        "relative_error": found.relative_error,
        "worst_relative_error": found.worst,
        "worst_module": found.worst_module,
    }


def _recipe_json(name: str | None, composed: PlannedStack) -> dict[str, Any]:
    """A stack as JSON shows it: its name, members, method."""
    stack, plan = composed
    members = zip(stack.members, plan.members, strict=True)
    return {
        "stack": name,
        "base": stack.base.name,
        "members": [{**member.entry().json(), "rank": planned.rank} for member, planned in members],
        "method": stack.method,
        "options": msgspec.to_builtins(stack.options),
    }


def _screen(data: dict[str, Any], stack: ResolvedStack, plan: StackPlan) -> Any:
    from rich.console import Group
    from rich.text import Text

    from stackctl.cli.inspect_facts import stack_tree

    total = format_sum(((m.adapter.name, m.weight) for m in stack.members), None if data["exact"] else plan.method)
    head = f"{'would compose' if data['dry_run'] else 'composed'} {data['stack']}: {total}"
    foot = f"exact sum, rank {data['rank']} at most, {len(plan.modules)} modules"
    if not data["exact"]:
        foot = f"{plan.method}, not the exact sum: relative error {data.get('relative_error', 0.0):.3g}"
        if worst := data.get("worst_module"):
            foot += f", at worst {data['worst_relative_error']:.3g} on {worst}"
    follow = "" if data["dry_run"] else '\nit is the current stack; next: stackctl generate -p "…"'
    fitted = [Text(line) for line in fit_lines(data["fit"])] if "fit" in data else []
    tried = [best_table(data), Text("")] if "tried" in data else []
    return Group(*tried, Text(head), *fitted, stack_tree(stack, plan, problems=False), Text(foot + follow))
