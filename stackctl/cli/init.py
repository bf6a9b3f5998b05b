"""stackctl init"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stackctl.cli.command import REGISTRY, Context, command
from stackctl.core.errors import Usage
from stackctl.registry.store import asked_registry, init_registry
from stackctl.render.output import Result


@command("init", example="stackctl init", panel=REGISTRY)
def init(
    context: Context,
    directory: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DIR]",
            help="The registry's folder; else --registry or STACKCTL_REGISTRY, else registry.",
            show_default=False,
        ),
    ] = None,
) -> Result:
    """Make a registry: a folder of small YAML files that says which adapters and stacks there are."""
    asked = context.registry_option
    if directory is not None and asked is not None and directory.resolve() != asked.resolve():
        raise Usage(f"two folders: {directory} and --registry {asked}", hint="leave out one of them")
    folder = (directory or asked_registry(asked) or Path("registry")).absolute()
    made = init_registry(folder)
    said = f"made an empty registry in {folder}" if made else f"there is a registry in {folder} already"
    return Result({"registry": str(folder), "created": made}, str(folder), f"{said}\nnext: stackctl base add smollm2")
