"""stackctl inspect"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from stackctl.checkpoint import find_checkpoint_folder, read_checkpoint
from stackctl.cli.common import KNOW, BaseOption, Context, What, command
from stackctl.curve import Curve, read_curve, render_terminal
from stackctl.errors import Usage
from stackctl.files import human_bytes
from stackctl.inspection import (
    adapter_info,
    base_info,
    checkpoint_info,
    facts_tree,
    looks_like_path,
    module_table,
    stack_info,
    stack_tree,
)
from stackctl.names import parse_expression
from stackctl.output import Result
from stackctl.plan import PlanMember, StackPlan
from stackctl.planning import plan_stack
from stackctl.registry import ResolvedStack
from stackctl.serving import TITLES, serving_recipes
from stackctl.targets import lint_for

_CURVE_WIDTH = 80
"""Columns of a loss curve: what every terminal has."""


def register(app: typer.Typer) -> None:
    @command(app, "inspect", example="stackctl inspect style+instruct", panel=KNOW)
    def inspect(
        context: Context,
        what: What = None,
        base: BaseOption = None,
        verify: Annotated[bool, typer.Option("--verify", help="Hash the files again and compare.")] = False,
        modules: Annotated[bool, typer.Option("--modules", help="Show every module with ranks and scalings.")] = False,
        weights: Annotated[bool, typer.Option("--weights", help="Show ‖ΔW‖ of every layer and module.")] = False,
        target: Annotated[
            Literal["vllm", "gguf", "ollama"] | None,
            typer.Option("--for", help="Say in advance what that program would reject."),
        ] = None,
        curve: Annotated[
            bool, typer.Option("--curve", help="Show the losses of the training; in JSON every point of them.")
        ] = False,
        serve: Annotated[
            bool, typer.Option("--serve", help="Show what to type to serve it with vLLM, llama.cpp and Ollama.")
        ] = False,
    ) -> Result:
        """Tell what an adapter, a stack, an expression, a base or any PEFT folder is, needs, and lacks."""
        if what is not None and looks_like_path(what):
            if serve:
                raise Usage("--serve is for what is registered", hint=f"register it first: stackctl add NAME {what}")
            return _inspect_path(Path(what), _Wishes(verify, modules, weights, target, curve))
        registry = context.registry
        stack = registry.resolve(what, base=base)
        if not stack.members and stack.name is None:
            if verify or modules or weights or target or curve or serve:
                raise Usage("a base has no deltas to look at", hint=f"stackctl inspect {stack.base.name}")
            info = base_info(stack.base)
            return _result({**info, "problems": []}, lambda: _facts(info, stack.base.name))
        plan = registry.plan(stack)
        if verify or weights:
            registry.check_digests(stack.members, fresh=verify)
        one = _is_one_adapter(stack)
        info = adapter_info(stack.members[0], plan, registry) if one else stack_info(stack, plan)
        found = _add_wishes(info, plan, _Wishes(verify, modules, weights, target, curve))
        if serve:
            recipes = serving_recipes(stack, plan, registry.root, named=context.registry_option is not None)
            info["serve"] = {name: recipe.json() for name, recipe in recipes.items()}
        return _result(info, lambda: _screen(info, stack, plan, found), stack.notes)


@dataclass(frozen=True)
class _Wishes:
    """What is to be told beside the usual."""

    verify: bool
    modules: bool
    weights: bool
    target: str | None
    curve: bool


def _add_wishes(info: dict[str, Any], plan: StackPlan, wishes: _Wishes) -> list[dict[str, Any]]:
    """Put what was asked for into ``info``; returns what stands in the way of the target program."""
    if wishes.verify:
        info["verified"] = True
    if wishes.modules:
        info["module_table"] = module_table(plan)
    found = [p.json() for p in lint_for(wishes.target, plan)] if wishes.target else []
    if wishes.target:
        info |= {"for": wishes.target, "problems": [*info["problems"], *found]}
    if wishes.weights:
        from stackctl.engine.norms import module_norms

        info["weights"] = module_norms(plan)
    if wishes.curve:
        info["curves"] = {member.label: _points(member.checkpoint.path) for member in plan.members}
    return found


def _points(folder: Path) -> dict[str, Any]:
    """A curve as JSON has it."""
    curve = read_curve(folder)
    return {"loss": curve.training, "eval_loss": curve.held_out}


def _inspect_path(path: Path, wishes: _Wishes) -> Result:
    """A PEFT folder by itself, registered or not: there is no digest to compare with."""
    if wishes.verify:
        raise Usage("--verify compares with what was registered", hint=f"register it first: stackctl add NAME {path}")
    checkpoint = read_checkpoint(find_checkpoint_folder(path))
    info = checkpoint_info(checkpoint)
    plan = plan_stack(None, [PlanMember(checkpoint.path.resolve().name, 1.0, checkpoint)])
    found = _add_wishes(info, plan, wishes)

    def screen() -> Any:
        from rich.console import Group

        return Group(_facts(info, info["path"]), *_wished(info, found))

    return _result(info, screen)


def _is_one_adapter(stack: ResolvedStack) -> bool:
    if stack.name or len(stack.members) != 1:
        return False
    terms = parse_expression(stack.text)
    return len(terms) == 1 and terms[0].weight == 1 and terms[0].reference.name == stack.members[0].adapter.name


def _result(info: dict[str, Any], screen: Any, notes: tuple[str, ...] = ()) -> Result:
    name = info.get("stack") or info.get("adapter") or info.get("name") or info.get("path")
    return Result(info, str(name), screen, notes=notes)


def _facts(info: dict[str, Any], title: str) -> Any:
    hidden = {"kind", "problems", "modules", "info", "lora", "name", "module_table", "weights", "for", "curves"}
    facts = {key.replace("_", " "): value for key, value in info.items() if key not in hidden}
    if "bytes" in facts:
        facts["bytes"] = human_bytes(facts["bytes"])
    facts.update(info.get("lora", {}))
    if isinstance(info.get("modules"), dict):
        facts["modules"] = "\n".join(f"{name}  {m['type']} {m['shape']}" for name, m in info["modules"].items())
    return facts_tree(f"{info['kind']} {title}", facts, info.get("problems", []))


def _screen(info: dict[str, Any], stack: ResolvedStack, plan: StackPlan, found: list[dict[str, Any]]) -> Any:
    from rich.console import Group

    parts: list[Any] = []
    if info["kind"] == "adapter":
        shown = ("description", "digest", "base", "created", "dtype", "parameters", "rank", "path")
        facts = {key: info[key] for key in shown}
        facts["needs"] = "+".join(info["needs"])
        facts["targets"] = info["lora"].get("target_modules")
        if run := info.get("run"):
            facts["trained"] = (
                f"{run['steps']} steps, {run['supervised_tokens']:,} supervised tokens, loss {run['loss']:.3f}"
            )
            if run.get("kept_step") is not None:
                change = f"{run['eval_loss_before']:.3f} -> {run['eval_loss']:.3f}"
                facts["held out"] = f"loss {change}, the weights of step {run['kept_step']}"
        if data := info.get("data"):
            facts["data"] = f"{data['path']}, {data['records']} {data['format']} records"
        parts.append(facts_tree(f"adapter {info['adapter']}@{info['version']}", facts, info["problems"]))
        if "curves" not in info:
            parts += _curve_screen(read_curve(Path(info["path"])), height=6)
    else:
        parts.append(stack_tree(stack, plan))
        parts.append(
            f"{info['kind']} {info['stack']}: {info['method']}, rank {plan.rank} at most, {len(plan.modules)} modules"
        )
    parts += _wished(info, found)
    for name, recipe in info.get("serve", {}).items():
        parts.append(_recipe_screen(TITLES[name], recipe))
    if info.get("verified"):
        parts.append("the files are the ones that were registered")
    return Group(*parts)


def _wished(info: dict[str, Any], found: list[dict[str, Any]]) -> list[Any]:
    """The parts of a screen that were asked for by option."""
    parts: list[Any] = []
    if "module_table" in info:
        parts.append(_module_screen(info["module_table"]))
    if "weights" in info:
        parts.append(_weights_screen(info["weights"]))
    for label, points in info.get("curves", {}).items():
        lines = _curve_screen(Curve(tuple(points["loss"]), tuple(points["eval_loss"])), height=12)
        parts += [f"\n{label}" if lines else f"\n{label}: no losses were recorded", *lines]
    if "for" in info:
        parts.append(facts_tree(f"for {info['for']}: " + ("" if found else "nothing stands in the way"), {}, found))
    return parts


def _recipe_screen(title: str, recipe: dict[str, Any]) -> Any:
    """The lines as they are to be typed, each on one of its own however long; then what there is to say."""
    from rich.console import Group
    from rich.text import Text

    lines = [Text(line, no_wrap=True, overflow="ignore") for line in recipe["lines"]]
    notes = [Text(f"# {note}", style="dim") for note in recipe["notes"]]
    problems = [facts_tree("", {}, recipe["problems"])] if recipe["problems"] else []
    return Group(Text(f"\nserve with {title}", style="bold"), *lines, *notes, *problems)


def _curve_screen(curve: Curve, height: int) -> list[Any]:
    from rich.text import Text

    return [Text(line, no_wrap=True) for line in render_terminal(curve, _CURVE_WIDTH, height)]


def _module_screen(rows: list[dict[str, Any]]) -> Any:
    from stackctl.tables import table

    cells = [
        [
            row["module"],
            row["type"],
            "×".join(str(n) for n in row["shape"]),
            row["rank"],
            ", ".join(f"{f['member']} r={f['rank']} s={f['scaling']:g}" for f in row["members"]),
        ]
        for row in rows
    ]
    return table(["module", "type", "shape", "rank", "members"], cells)


def _weights_screen(rows: list[dict[str, Any]]) -> Any:
    """‖ΔW‖ as a table: a row for each layer, a column for each kind of module."""
    from stackctl.tables import table

    cells: dict[str, dict[str, float]] = {}
    for row in rows:
        parts = row["module"].split(".")
        index = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        layer, kind = (parts[index], parts[-1]) if index is not None else ("-", parts[-1])
        cells.setdefault(layer, {})[kind] = row["norm"]
    kinds = list(dict.fromkeys(kind for row in cells.values() for kind in row))
    lines = [[layer, *(f"{row[k]:.3g}" if k in row else "" for k in kinds)] for layer, row in cells.items()]
    return table(["layer", *kinds], lines, title="‖ΔW‖ of the stack")
