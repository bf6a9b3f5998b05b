"""stackctl rm"""

from __future__ import annotations

from typing import Annotated

import typer

from stackctl.cli.command import REGISTRY, Context, command
from stackctl.cli.shared_options import argument, complete_adapters
from stackctl.render.output import Result
from stackctl.storage.files import human_bytes


@command("rm", example="stackctl rm storyteller --dry-run\nstackctl rm instruct@1", panel=REGISTRY)
def rm(
    context: Context,
    reference: Annotated[
        str,
        argument(
            metavar="REF",
            help="A stack, an adapter with all its versions, or one version.",
            autocompletion=complete_adapters,
        ),
    ],
    dry_run: Annotated[bool, typer.Option(help="Show what would be removed; remove nothing.")] = False,
) -> Result:
    """Remove a stack, an adapter or one version of it; refused while something depends on it."""
    from stackctl.registry.remove import remove_entry

    removal = remove_entry(context.registry, reference, dry_run=dry_run)
    text = f"{'would remove' if dry_run else 'removed'} {', '.join(removal.removed)}"
    if removal.bytes:
        text += f"; {human_bytes(removal.bytes)} of weights are kept until: stackctl gc"
    data = {"removed": list(removal.removed), "bytes": removal.bytes, "dry_run": dry_run}
    return Result(data, "\n".join(removal.removed), text)
