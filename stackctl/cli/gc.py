"""stackctl gc"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from stackctl.bases import converted_models
from stackctl.cli.common import HOUSE, Context, command
from stackctl.files import human_bytes, remove_tree, tree_bytes
from stackctl.jobs import drop_runs, unfinished_runs
from stackctl.output import Result
from stackctl.registry import Freed


def register(app: typer.Typer) -> None:
    @command(app, "gc", example="stackctl gc --dry-run", panel=HOUSE)
    def gc(
        context: Context,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be freed; free nothing.")] = False,
        runs: Annotated[
            bool, typer.Option("--runs", help="Also the saves of unfinished training, which cannot be resumed then.")
        ] = False,
        cache: Annotated[
            bool, typer.Option("--cache", help="Also models converted from GGUF; they are made again when needed.")
        ] = False,
    ) -> Result:
        """Free the weights of removed versions, and what killed commands left; what an entry needs stays."""
        registry = context.registry
        freed = drop_runs(registry, dry_run=dry_run) if runs else []
        going = {found.what for found in freed}
        needed = {label for run in unfinished_runs(registry) if run["name"] not in going for label in run["on"]}
        freed += registry.free(needed, dry_run=dry_run)
        freed += _free_conversions(dry_run) if cache else []
        total = sum(found.bytes for found in freed)
        data = {"freed": [found.json() for found in freed], "bytes": total, "dry_run": dry_run}
        verb = "would free" if dry_run else "freed"
        said = f"{verb} {human_bytes(total)}" if freed else "nothing to free"
        return Result(data, "\n".join(found.what for found in freed), lambda: _screen(freed, said))


def _free_conversions(dry_run: bool) -> list[Freed]:
    freed = []
    with converted_models() as folder:
        for model in sorted(folder.glob("gguf-*")):
            freed.append(Freed(model.name, "converted from GGUF", str(model), tree_bytes(model)))
            if not dry_run:
                remove_tree(model)
    return freed


def _screen(freed: list[Freed], said: str) -> Any:
    from rich.console import Group

    from stackctl.tables import table

    rows = [[found.what, found.why, human_bytes(found.bytes)] for found in freed]
    return Group(table(["what", "why", "size"], rows), said) if rows else said
