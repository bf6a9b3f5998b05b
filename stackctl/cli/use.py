"""stackctl use"""

from __future__ import annotations

from typing import Annotated

from stackctl.cli.command import REGISTRY, Context, command
from stackctl.cli.shared_options import argument, complete_stacks
from stackctl.registry.stacks import use_stack
from stackctl.render.output import Result


@command("use", example="stackctl use storyteller", panel=REGISTRY)
def use(
    context: Context, stack: Annotated[str, argument(help="A stored stack.", autocompletion=complete_stacks)]
) -> Result:
    """Set the current stack: the one that is used when none is named."""
    entry = use_stack(context.registry, stack)
    return Result({"stack": entry.name}, entry.name, f"the current stack is {entry.name}")
