"""stackctl ls"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stackctl.cli.base import base_json
from stackctl.cli.command import INSPECT, Context, command
from stackctl.core.expressions import BASE, format_term
from stackctl.core.schema import Adapter, Stack
from stackctl.registry.run_folders import unfinished_runs
from stackctl.render.output import Result
from stackctl.storage.files import human_bytes

if TYPE_CHECKING:
    from stackctl.registry.lineage import LineageNode

_NOTHING = "nothing is registered yet; try: stackctl base add smollm2"


@command("ls", example="stackctl ls --tree\nstackctl ls --json", panel=INSPECT)
def ls(
    context: Context,
    tree: Annotated[bool, typer.Option(help="Show which version was trained on which, removed ones too.")] = False,
) -> Result:
    """List adapters, stacks, bases and unfinished training; long output goes through a pager.

    The pager is STACKCTL_PAGER, else PAGER, else less; an empty one, or cat, is none.
    """
    registry = context.registry
    root, current = str(registry.root), registry.settings().current
    entries = list(registry.adapters()) if tree else registry.adapters()
    adapters = [_adapter(entry, root) for entry in entries]
    stacks = [_stack(stack, current) for stack in registry.stacks()]
    bases = [base_json(base, registry) for base in registry.bases()]
    runs = list(unfinished_runs(registry))
    data: dict[str, Any] = {
        "registry": root,
        "current": current,
        "adapters": adapters,
        "stacks": stacks,
        "bases": bases,
        "runs": runs,
    }
    names = [one["name"] for one in (*adapters, *stacks, *bases)]
    if tree:
        from stackctl.registry.lineage import read_lineage

        lineage = read_lineage(registry, entries)
        data["lineage"] = [one.json() for one in lineage]
        roots = [base["name"] for base in bases]
        return Result(data, "\n".join(names), lambda: _tree_screen(lineage, roots), paged=True)
    return Result(data, "\n".join(names), lambda: _screen(adapters, stacks, bases, runs), paged=True)


def _adapter(adapter: Adapter, root: str) -> dict[str, Any]:
    return {
        "name": adapter.name,
        "description": adapter.description,
        "versions": [
            {
                "version": v.version,
                "digest": v.digest,
                "path": os.path.normpath(os.path.join(root, v.path)),  # noqa: PTH118 - a Path takes ten times as long
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
        "members": [member.json() for member in stack.members],
        "created": stack.created,
        "current": stack.name == current,
    }


def _tree_screen(lineage: list[LineageNode], bases: list[str]) -> Any:
    from stackctl.registry.lineage import tree_lines
    from stackctl.render.tables import TreeLines

    return TreeLines(lambda: tree_lines(lineage, bases)) if lineage or bases else _NOTHING


def _screen(
    adapters: list[dict[str, Any]],
    stacks: list[dict[str, Any]],
    bases: list[dict[str, Any]],
    runs: list[dict[str, Any]],
) -> Any:
    from stackctl.render.tables import StreamedTable, spaced, table

    parts: list[Any] = []
    if adapters:
        columns = ["adapter", "base", "trained on", "rank", "size", "loss", "created"]
        parts.append(StreamedTable(columns, lambda: (line for adapter in adapters for line in _version_lines(adapter))))
    if stacks:
        parts.append(StreamedTable(["  stack", "base", "members"], lambda: (_stack_line(stack) for stack in stacks)))
    if bases:
        rows = [[b["name"], b["source"], f"{b['parameters']:,}", b["dtype"]] for b in bases]
        parts.append(table(["base", "source", "parameters", "dtype"], rows))
    if runs:
        rows = [[r["name"], r["step"], f"stackctl train {r['name']} … --resume"] for r in runs]
        parts.append(table(["unfinished", "step", "go on with"], rows))
    return spaced(parts) if parts else _NOTHING


def _version_lines(adapter: dict[str, Any]) -> Iterator[list[str]]:
    for v in adapter["versions"]:
        trained_on = "+".join(v["trained_on"]) or "-"
        loss = f"{v['loss']:.3f}" if v["loss"] is not None else "-"
        label, size = f"{adapter['name']}@{v['version']}", human_bytes(v["bytes"])
        yield [label, v["base"], trained_on, str(v["rank"]), size, loss, v["created"][:10]]


def _stack_line(stack: dict[str, Any]) -> list[str]:
    members = "+".join(format_term(f"{m['adapter']}@{m['version']}", m["weight"]) for m in stack["members"])
    return [("* " if stack["current"] else "  ") + stack["name"], stack["base"], members or BASE]
