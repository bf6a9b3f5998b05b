"""Arguments and options that several commands have: what they are, how shells complete them, how they are read."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from typer.models import OptionInfo, ParameterInfo

from stackctl.core.errors import Usage
from stackctl.core.template_arguments import Arguments, template_arguments
from stackctl.storage.paths import typed_path

if TYPE_CHECKING:
    from stackctl.registry.store import Registry


def typed_text(value: str) -> str:
    """A parser of options that are texts and name no file: a shell passes any bytes on, models read UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise typer.BadParameter("it is not UTF-8") from None
    return value


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


def _path_parser(label: str) -> Callable[[str], Path]:
    """A parser of paths, with ``~`` for the home: within ``--out=~/x`` and in quotes no shell replaces it."""

    def path(text: str) -> Path:  # typer calls the type by its name
        return typed_path(text, what=label)

    return path


def _word_parser(label: str) -> Callable[[str], str]:
    """A parser of names, expressions and other words, none of which is empty: ``"$KEY"`` is where nothing was set."""

    def word(text: str) -> str:
        if not text:
            raise Usage(f"{label} is empty", hint=f"give it a value, or leave {label} out")
        return text

    return word


def read_words(parameter: inspect.Parameter) -> None:
    """Paths and words are read by our own parsers; a text that may be empty brings :func:`typed_text`.

    Completing a path is left to the shell: typer answers with what was typed already.
    """
    type_, *infos = get_args(parameter.annotation)
    types = {type_, *get_args(type_), *(inner for part in get_args(type_) for inner in get_args(part))}
    for info in infos:
        if not isinstance(info, ParameterInfo) or info.parser:
            continue
        label = (info.metavar or parameter.name.upper()).strip("[]")
        if isinstance(info, OptionInfo):
            label = "--" + parameter.name.strip("_").replace("_", "-")
        if Path in types:
            info.autocompletion = _nothing
            info.parser = _path_parser(label)
        elif str in types and isinstance(info, OptionInfo):
            info.parser = _word_parser(label)


def _nothing() -> list[str]:
    return []
