"""stackctl gc"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from stackctl.cli.command import REGISTRY, Context, command
from stackctl.registry.garbage_collection import Freed, drop_runs, free_caches, free_logs, free_weights
from stackctl.registry.run_folders import unfinished_runs
from stackctl.registry.store import Registry
from stackctl.render.output import Result
from stackctl.storage.files import human_bytes, tree_bytes


@command("gc", example="stackctl gc --runs --logs\nstackctl gc --dry-run", panel=REGISTRY)
def gc(
    context: Context,
    dry_run: Annotated[bool, typer.Option(help="Show what would be deleted; delete nothing.")] = False,
    runs: Annotated[
        bool, typer.Option(help="Also delete saves of unfinished training, which then cannot be resumed.")
    ] = False,
    logs: Annotated[bool, typer.Option(help="Also delete what --report-to logged for finished runs.")] = False,
    cache: Annotated[
        bool,
        typer.Option(help="Also delete cached tokens, exported adapters and converted GGUF models, of every registry."),
    ] = False,
) -> Result:
    """Delete the weights of removed versions and what killed commands left; what an entry needs stays.

    So are logs of versions that are gone, and cached tokens and exports that were not used for 30 days. What was
    cached is made again when it is needed.
    """
    registry = context.registry
    # first: on a full disk there is no space for the entries that the weights take
    cached = free_caches(every=cache, dry_run=dry_run)
    freed = drop_runs(registry, dry_run=dry_run) if runs else []
    going = {found.what for found in freed}
    needed = {label for run in unfinished_runs(registry) if run["name"] not in going for label in run["on"]}
    freed += free_weights(registry, needed, dry_run=dry_run)
    freed += free_logs(registry, {found.what for found in freed}, every=logs, dry_run=dry_run)
    freed += cached
    total = sum(found.bytes for found in freed)
    kept = _kept(registry, {found.path for found in freed})
    data = {"freed": [asdict(found) for found in freed], "bytes": total, "kept": kept, "dry_run": dry_run}
    verb = "would free" if dry_run else "freed"
    said = [f"{verb} {human_bytes(total)}" if freed else "nothing to free"]
    said += [f"kept {human_bytes(size)} of {_KEPT[name]}: stackctl gc --{name}" for name, size in kept.items() if size]
    return Result(data, "\n".join(found.what for found in freed), lambda: _screen(freed, "\n".join(said)))


_KEPT = {"runs": "unfinished training", "logs": "logs", "cache": "cached tokens, exports and converted models"}


def _kept(registry: Registry, freed: set[str]) -> dict[str, int]:
    """The bytes of what only an option frees, by its name."""
    runs = [run["path"] for run in unfinished_runs(registry)]
    found = {"logs": free_logs(registry, every=True, dry_run=True), "cache": free_caches(every=True, dry_run=True)}
    return {
        "runs": sum(tree_bytes(Path(path)) for path in runs if path not in freed),
        **{name: sum(one.bytes for one in places if one.path not in freed) for name, places in found.items()},
    }


def _screen(freed: list[Freed], said: str) -> Any:
    from stackctl.render.tables import spaced, table

    rows = [[found.what, found.why, human_bytes(found.bytes)] for found in freed]
    return spaced([table(["what", "why", "size"], rows), said]) if rows else said
