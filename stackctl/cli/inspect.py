"""stackctl inspect"""

from __future__ import annotations

import functools
import shlex
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from stackctl.cli.command import INSPECT, Context, command
from stackctl.cli.inspect_facts import (
    adapter_info,
    base_info,
    checkpoint_info,
    looks_like_path,
    module_table,
    stack_info,
)
from stackctl.cli.inspect_page import inspection_page
from stackctl.cli.inspect_screen import Extras, checkpoint_screen, facts_screen, stack_screen
from stackctl.cli.shared_options import BaseOption, What
from stackctl.core.errors import NotFound, Usage
from stackctl.core.expressions import parse_expression
from stackctl.core.schema import Adapter, Base, Stack
from stackctl.lora.checkpoint import CONFIG, Checkpoint, find_checkpoint_folder, read_checkpoint, read_info
from stackctl.lora.no_effect import NO_EFFECT, has_no_effect
from stackctl.plan.build import plan_stack
from stackctl.plan.lint import lint_for
from stackctl.plan.stack_plan import PlanMember, Problem, StackPlan
from stackctl.registry.base_entries import resolve_base
from stackctl.registry.base_matching import StatedBase, recognise_base
from stackctl.registry.base_models import check_linked_base
from stackctl.registry.checkpoint_files import check_digests
from stackctl.registry.lineage import read_lineage
from stackctl.registry.planning import read_plan
from stackctl.registry.resolve import ResolvedStack, resolve_expression
from stackctl.registry.store import Registry
from stackctl.render.html import check_page_place, write_page
from stackctl.render.loss_curve import read_curve
from stackctl.render.output import Result
from stackctl.serving.commands import serve_commands
from stackctl.storage.paths import typed_path

_EXAMPLES = """\
stackctl inspect ./output/checkpoint-531
stackctl inspect style --weights
stackctl inspect style+instruct --interference
stackctl inspect storyteller --serve
stackctl inspect storyteller --output storyteller.html
stackctl inspect style+instruct"""


@dataclass(frozen=True)
class _InspectOptions:
    """What is to be told beside the usual: each field is an option, with its help."""

    verify: Annotated[bool, typer.Option(help="Hash the files again and compare.")] = False
    modules: Annotated[bool, typer.Option(help="Show every module with ranks and scalings.")] = False
    weights: Annotated[bool, typer.Option(help="Draw ‖ΔW‖ of every layer and module.")] = False
    interference: Annotated[
        bool, typer.Option(help="Show how much members of a stack overlap, and where they are opposed.")
    ] = False
    target: Annotated[
        Literal["vllm", "gguf", "ollama"] | None,
        typer.Option("--for", help="Check for what that program would reject."),
    ] = None
    curve: Annotated[bool, typer.Option(help="Show the loss curve of the training; with --json every point.")] = False
    serve: Annotated[bool, typer.Option(help="Show the commands that serve it with vLLM, llama.cpp and Ollama.")] = (
        False
    )
    output: Annotated[
        Path | None,
        typer.Option(help="Write a page with all plots: norms, interference, loss curves, lineage.", metavar="FILE"),
    ] = None

    @property
    def any(self) -> bool:
        return any(astuple(self))


@command("inspect", example=_EXAMPLES, panel=INSPECT)
def inspect(context: Context, what: What = None, base: BaseOption = None, *, options: _InspectOptions) -> Result:
    """Describe an adapter, a stack, an expression, a base or any PEFT folder, with every problem found."""
    if options.output is not None:
        check_page_place(options.output)
    if what is not None and _means_folder(what, context):
        if options.serve:
            raise Usage(
                "--serve is for what is registered", hint=f"register it first: stackctl add NAME {shlex.quote(what)}"
            )
        return _inspect_path(typed_path(what), options, context, base)
    registry = context.registry
    stack = resolve_expression(registry, what, base=base)
    if not stack.members and stack.name is None:
        if replace(options, verify=False).any:
            raise Usage(
                f"{stack.base.name} is a base, and what was asked about are adapters",
                hint=f"name a stack, or leave the options out: stackctl inspect {stack.base.name}",
            )
        info = base_info(stack.base)
        if options.verify:
            check_linked_base(stack.base, registry.root)
            info["verified"] = True
        return _result({**info, "problems": []}, lambda: facts_screen(info, stack.base.name))
    if options.interference and len(stack.members) < 2:
        raise Usage(
            f"{stack.text} has one member; interference takes two",
            hint=f"name several: stackctl inspect {stack.text}+OTHER --interference",
        )
    plan = read_plan(registry, stack)
    if options.verify or options.weights or options.interference or options.output:
        check_digests(registry, stack.members, fresh=options.verify)
    one = _is_one_adapter(stack)
    info = adapter_info(stack.members[0], plan, registry) if one else stack_info(stack, plan)
    extras = _add_asked(info, plan, options, registry)
    if options.serve:
        recipes = serve_commands(stack, plan, registry.root, named=context.registry_option is not None)
        info["serve"] = {name: recipe.json() for name, recipe in recipes.items()}
    return _result(info, lambda: stack_screen(info, stack, plan, extras), stack.notes)


def _add_asked(
    info: dict[str, Any], plan: StackPlan, options: _InspectOptions, registry: Registry | None = None
) -> Extras:
    """Put what was asked for into ``info``, and return what a screen needs besides."""
    if options.verify:
        info["verified"] = True
    if options.modules:
        info["module_table"] = module_table(plan)
    idle = [
        Problem("no_effect", f"{member.label} {NO_EFFECT}", "train it, or leave it out", member.label, "warning")
        for member in plan.members
        if has_no_effect(member.checkpoint)
    ]
    info["problems"] = [*info["problems"], *(problem.json() for problem in idle)]
    found = [p.json() for p in lint_for(options.target, plan)] if options.target else []
    if options.target:
        info |= {"for": options.target, "problems": [*info["problems"], *found]}
    norms: list[dict[str, Any]] = []
    if options.weights or options.output:
        from stackctl.engine.norms import module_norms

        norms = module_norms(plan, functools.partial(_own_rows, plan, registry) if registry else None)
    measured = None
    if options.interference or (options.output and len(plan.members) > 1):
        from stackctl.engine.interference import measure_interference

        measured = measure_interference(plan)
    if options.weights:
        info["weights"] = norms
    if options.interference and measured:
        info["interference"] = measured.json()
    wants_curves = options.curve or options.output
    curves = {member.label: read_curve(member.checkpoint.path) for member in plan.members} if wants_curves else {}
    if options.curve:
        info["curves"] = {who: {"loss": curve.training, "eval_loss": curve.held_out} for who, curve in curves.items()}
    if options.output:
        lineage = read_lineage(registry) if registry else []
        write_page(options.output, inspection_page(info, plan, norms, curves, measured, lineage))
        info["page"] = str(options.output.absolute())
    return Extras(tuple(found), measured if options.interference else None)


def _own_rows(plan: StackPlan, registry: Registry) -> Any:
    """A reader of the base's own rows, for how far a member's are from them."""
    from stackctl.engine.base.folder import base_folder
    from stackctl.engine.token_rows import base_rows

    return base_rows(plan, base_folder(plan.known_base, registry, lambda _: None))


def _means_folder(what: str, context: Context) -> bool:
    """Whether a text means a PEFT folder; where something registered is called so as well, that is meant."""
    if looks_like_path(what):
        return True
    if not (Path(what) / CONFIG).is_file():
        return False
    try:
        return all(what not in context.registry.names(kind) for kind in (Adapter, Stack, Base))
    except NotFound:  # no registry
        return True


def _own_base(checkpoint: Checkpoint, context: Context, asked: str | None) -> Base | None:
    """The base to check a folder with: the one that was asked for, else the one that it names, if that is here."""
    if asked is not None:
        return resolve_base(context.registry, asked)
    try:
        return recognise_base(context.registry, StatedBase.of(checkpoint.config, read_info(checkpoint.path)))
    except NotFound:  # no registry
        return None


def _inspect_path(path: Path, options: _InspectOptions, context: Context, base: str | None) -> Result:
    """A PEFT folder by itself, registered or not: there is no digest to compare with."""
    if options.verify:
        raise Usage(
            "--verify compares with what was registered",
            hint=f"register it first: stackctl add NAME {shlex.quote(str(path))}",
        )
    if options.interference:
        raise Usage("--interference is between the members of a stack", hint="stackctl inspect STACK --interference")
    checkpoint = read_checkpoint(find_checkpoint_folder(path))
    member = PlanMember(checkpoint.path.resolve().name, 1.0, checkpoint)
    plan = plan_stack(_own_base(checkpoint, context, base), [member])
    info = checkpoint_info(checkpoint, plan)
    extras = _add_asked(info, plan, options)
    return _result(info, lambda: checkpoint_screen(info, extras))


def _is_one_adapter(stack: ResolvedStack) -> bool:
    if stack.name or len(stack.members) != 1:
        return False
    terms = parse_expression(stack.text)
    return len(terms) == 1 and terms[0].weight == 1 and terms[0].reference.name == stack.members[0].adapter.name


def _result(info: dict[str, Any], screen: Any, notes: tuple[str, ...] = ()) -> Result:
    name = info.get("page") or info.get("stack") or info.get("adapter") or info.get("name") or info.get("path")
    return Result(info, str(name), screen, notes=notes)
