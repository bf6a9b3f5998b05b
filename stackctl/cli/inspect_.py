"""stackctl inspect"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from stackctl.checkpoint import find_checkpoint_folder, read_checkpoint
from stackctl.cli.common import KNOW, BaseOption, Context, What, command
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
from stackctl.plan import StackPlan
from stackctl.registry import Registry, ResolvedStack


def register(app: typer.Typer) -> None:
    @command(app, "inspect", example="stackctl inspect style+instruct", panel=KNOW)
    def inspect(
        context: Context,
        what: What = None,
        base: BaseOption = None,
        verify: Annotated[bool, typer.Option("--verify", help="Hash the files again and compare.")] = False,
        modules: Annotated[bool, typer.Option("--modules", help="Show every module with ranks and scalings.")] = False,
    ) -> Result:
        """Tell what an adapter, a stack, an expression, a base or any PEFT folder is, needs, and lacks."""
        if what is not None and looks_like_path(what):
            checkpoint = read_checkpoint(find_checkpoint_folder(Path(what)))
            info = checkpoint_info(checkpoint)
            return _result(info, lambda: _facts(info, str(checkpoint.path)))
        registry = context.registry
        stack = registry.resolve(what, base=base)
        if not stack.members and stack.name is None:
            info = base_info(stack.base)
            return _result({**info, "problems": []}, lambda: _facts(info, stack.base.name))
        plan = registry.plan(stack)
        if verify:
            registry.check_digests(stack.members)
        one = _is_one_adapter(stack)
        info = adapter_info(stack.members[0], plan, registry) if one else stack_info(stack, plan)
        info |= {"verified": True} if verify else {}
        info |= {"module_table": module_table(plan)} if modules else {}
        return _result(info, lambda: _screen(info, stack, plan, registry, modules), stack.notes)


def _is_one_adapter(stack: ResolvedStack) -> bool:
    if stack.name or len(stack.members) != 1:
        return False
    terms = parse_expression(stack.text)
    return len(terms) == 1 and terms[0].weight == 1 and terms[0].reference.name == stack.members[0].adapter.name


def _result(info: dict[str, Any], screen: Any, notes: tuple[str, ...] = ()) -> Result:
    name = info.get("stack") or info.get("adapter") or info.get("name") or info.get("path")
    return Result(info, str(name), screen, notes=notes)


def _facts(info: dict[str, Any], title: str) -> Any:
    hidden = {"kind", "problems", "modules", "info", "lora", "name"}
    facts = {key.replace("_", " "): value for key, value in info.items() if key not in hidden}
    if "bytes" in facts:
        facts["bytes"] = human_bytes(facts["bytes"])
    facts.update(info.get("lora", {}))
    if isinstance(info.get("modules"), dict):
        facts["modules"] = "\n".join(f"{name}  {m['type']} {m['shape']}" for name, m in info["modules"].items())
    return facts_tree(f"{info['kind']} {title}", facts, info.get("problems", []))


def _screen(info: dict[str, Any], stack: ResolvedStack, plan: StackPlan, registry: Registry, modules: bool) -> Any:
    from rich.console import Group

    from stackctl.tables import table

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
        if data := info.get("data"):
            facts["data"] = f"{data['path']}, {data['records']} {data['format']} records"
        parts.append(facts_tree(f"adapter {info['adapter']}@{info['version']}", facts, info["problems"]))
    else:
        parts.append(stack_tree(stack, plan))
        parts.append(
            f"{info['kind']} {info['stack']}: {info['method']}, rank {plan.rank} at most, {len(plan.modules)} modules"
        )
    if modules:
        rows = [
            [m["module"], m["type"], "×".join(str(n) for n in m["shape"]), m["rank"],
             ", ".join(f"{f['member']} r={f['rank']} s={f['scaling']:g}" for f in m["members"])]
            for m in module_table(plan)
        ]  # fmt: skip
        parts.append(table(["module", "type", "shape", "rank", "members"], rows))
    if info.get("verified"):
        parts.append("the files are the ones that were registered")
    return Group(*parts)
