"""Arguments and options that several commands have, and how shells complete them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stackctl.cli.typed_values import typed_text
from stackctl.core.template_arguments import Arguments, template_arguments

if TYPE_CHECKING:
    from stackctl.registry.store import Registry

DEVICE_PANEL = "Device and precision"
"""The options that say where and how precisely to compute."""
of_device = functools.partial(typer.Option, rich_help_panel=DEVICE_PANEL)


def completions(registry: Registry, incomplete: str, *kinds: str) -> list[str]:
    """An expression as far as it was typed, with each name, or version, that its last term could become."""
    from stackctl.core.schema import Adapter, Base, Stack

    types = {"adapters": Adapter, "stacks": Stack, "bases": Base}
    head, plus, tail = incomplete.rpartition("+")
    name, at, _ = tail.partition("@")
    if at:
        adapter = registry.find_adapter(name) if name in registry.names(Adapter) and "adapters" in kinds else None
        found = [f"{name}@{version.version}" for version in reversed(adapter.versions)] if adapter else []
        return [f"{head}{plus}{label}" for label in found if label.startswith(tail)]
    names = [name for kind in kinds for name in registry.names(types[kind])]
    return [f"{head}{plus}{name}" for name in names if name.startswith(tail)]


def _complete(*kinds: str) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        from stackctl.core.errors import StackctlError
        from stackctl.registry.store import Registry

        try:
            return completions(Registry.open(), incomplete, *kinds)
        except StackctlError:
            return []

    return complete


complete_what = _complete("adapters", "stacks", "bases")
complete_stacks = _complete("stacks")
complete_bases = _complete("bases")
complete_adapters = _complete("adapters", "stacks")
argument = functools.partial(typer.Argument, show_default=False)
expression = functools.partial(argument, autocompletion=complete_what)

What = Annotated[
    str | None,
    expression(
        help="An expression such as style:0.7+instruct@2, a stack, a base, or 'base'; the current stack when left out."
    ),
]
BaseOption = Annotated[
    str | None,
    typer.Option(help="The base model, when it cannot be inferred.", autocompletion=complete_bases, metavar="NAME"),
]
NEW_ADAPTER = Annotated[str, argument(help="What the adapter is called here.")]
DESCRIPTION = Annotated[str, typer.Option(parser=typed_text, metavar="TEXT", help="A line about the adapter.")]


@dataclasses.dataclass(frozen=True)
class TemplateOptions:
    """What is given to the chat template; each field is an option, with its help."""

    chat_template_kwargs: Annotated[
        str | None,
        typer.Option(
            "--chat-template-kwargs", help="Arguments for the chat template, as a JSON object.", metavar="JSON"
        ),
    ] = None
    enable_thinking: Annotated[
        bool | None,
        typer.Option(
            "--enable-thinking/--no-enable-thinking",
            help="The chat template's argument of that name: whether the assistant thinks first.",
        ),
    ] = None

    def template(self, known: Mapping[str, Any] | None = None) -> Arguments:
        """The arguments by their names, with ``known`` ones where these options say nothing of them.

        Raises:
            Usage: they are no JSON object.
        """
        return template_arguments(self.chat_template_kwargs, self.enable_thinking, known)
