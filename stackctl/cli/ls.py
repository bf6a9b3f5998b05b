"""stackctl ls"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from stackctl.cli.base import base_json
from stackctl.cli.common import KNOW, Context, command
from stackctl.files import human_bytes
from stackctl.jobs import unfinished_runs
from stackctl.lineage import Kin, read_lineage, tree_lines
from stackctl.output import Result
from stackctl.registry import Registry
from stackctl.schema import Adapter, Stack

_NOTHING = "nothing is registered yet; try: stackctl base add smollm2"


def register(app: typer.Typer) -> None:
    @command(app, "ls", example="stackctl ls --json", panel=KNOW)
    def ls(
        context: Context,
        tree: Annotated[
            bool, typer.Option("--tree", help="Show which version was trained on which, removed ones too.")
        ] = False,
    ) -> Result:
        """List adapters, stacks, bases, and training that is unfinished."""
        registry = context.registry
        current = registry.settings().current
        data: dict[str, Any] = {
            "registry": str(registry.root),
            "current": current,
            "adapters": [_adapter(adapter, registry) for adapter in registry.adapters()],
            "stacks": [_stack(stack, current) for stack in registry.stacks()],
            "bases": [base_json(base, registry) for base in registry.bases()],
            "runs": list(unfinished_runs(registry)),
        }
        names = [row["name"] for kind in ("adapters", "stacks", "bases") for row in data[kind]]
        if tree:
            kin = read_lineage(registry)
            data["lineage"] = [one.json() for one in kin]
            return Result(data, "\n".join(names), lambda: _tree_screen(kin, [base["name"] for base in data["bases"]]))
        return Result(data, "\n".join(names), lambda: _screen(data))


def _adapter(adapter: Adapter, registry: Registry) -> dict[str, Any]:
    return {
        "name": adapter.name,
        "description": adapter.description,
        "versions": [
            {
                "version": v.version,
                "digest": v.digest,
                "path": str(registry.weights_path(v)),
                "base": v.base,
                "trained_on": v.trained_on,
                "created": v.created,
                "rank": v.lora.r,
                "parameters": v.parameters,
                "bytes": v.bytes,
                "loss": v.run.loss if v.run else None,
            }
            for v in adapter.versions
        ],
    }


def _stack(stack: Stack, current: str | None) -> dict[str, Any]:
    return {
        "name": stack.name,
        "base": stack.base,
        "method": stack.method,
        "members": [
            {"adapter": m.adapter, "version": m.version, "digest": m.digest, "weight": m.weight} for m in stack.members
        ],
        "created": stack.created,
        "current": stack.name == current,
    }


def _tree_screen(kin: list[Kin], bases: list[str]) -> Any:
    from rich.text import Text

    lines = [
        Text.assemble(guide, (name, "" if guide else "bold"), (f"  {remark}" if remark else "", "dim"))
        for guide, name, remark in tree_lines(kin, bases)
    ]
    text = Text("\n").join(lines)
    text.no_wrap, text.overflow = True, "ellipsis"
    return text if lines else _NOTHING


def _screen(data: dict[str, Any]) -> Any:
    from rich.console import Group

    from stackctl.names import format_term
    from stackctl.tables import table

    parts: list[Any] = []
    if data["adapters"]:
        rows = [
            [
                f"{a['name']}@{v['version']}",
                v["base"],
                "+".join(v["trained_on"]) or "-",
                v["rank"],
                human_bytes(v["bytes"]),
                f"{v['loss']:.3f}" if v["loss"] is not None else "-",
                v["created"][:10],
            ]
            for a in data["adapters"]
            for v in a["versions"]
        ]
        parts.append(table(["adapter", "base", "trained on", "rank", "size", "loss", "created"], rows))
    if data["stacks"]:
        rows = [
            [
                ("* " if s["current"] else "  ") + s["name"],
                s["base"],
                "+".join(format_term(f"{m['adapter']}@{m['version']}", m["weight"]) for m in s["members"]) or "base",
            ]
            for s in data["stacks"]
        ]
        parts.append(table(["  stack", "base", "members"], rows))
    if data["bases"]:
        rows = [[b["name"], b["source"], f"{b['parameters']:,}", b["dtype"]] for b in data["bases"]]
        parts.append(table(["base", "source", "parameters", "dtype"], rows))
    if data["runs"]:
        rows = [[r["name"], r["step"], f"stackctl train {r['name']} … --resume"] for r in data["runs"]]
        parts.append(table(["unfinished", "step", "go on with"], rows))
    return Group(*parts) if parts else _NOTHING
