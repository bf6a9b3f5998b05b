"""stackctl rm"""

from __future__ import annotations

from typing import Annotated

import typer

from stackctl.cli.common import HOUSE, Context, command, complete_adapters
from stackctl.output import Result


def register(app: typer.Typer) -> None:
    @command(app, "rm", example="stackctl rm instruct@1", panel=HOUSE)
    def rm(
        context: Context,
        reference: Annotated[
            str,
            typer.Argument(
                metavar="REF",
                help="A stack, an adapter with all its versions, or one version.",
                autocompletion=complete_adapters,
                show_default=False,
            ),
        ],
    ) -> Result:
        """Remove a stack, an adapter or one version of it; refused while something stands on it."""
        removed = context.registry.remove(reference)
        return Result({"removed": removed}, "\n".join(removed), f"removed {', '.join(removed)}")
