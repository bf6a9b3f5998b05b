"""What makes a function a command: the options that all have, its example, how it ends."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup
from typer.models import ArgumentInfo, OptionInfo

from stackctl.cli.help_page import COMMON, HelpPage
from stackctl.cli.progress import share_progress
from stackctl.cli.shared_options import read_words, typed_text
from stackctl.core import Say
from stackctl.core.errors import Usage, did_you_mean
from stackctl.jobs.ranks import make_output
from stackctl.render.output import Output, Result

if TYPE_CHECKING:
    from stackctl.core.schema import Base
    from stackctl.registry.store import Registry

TRAIN = "Train and use"
INSPECT = "Inspect and check"
SHARE = "Share"
REGISTRY = "Registry"
"""The panels of ``stackctl --help``, in the order of a user's work."""
_common_option = functools.partial(typer.Option, rich_help_panel=COMMON)

_COMMON: dict[str, tuple[Any, Any]] = {
    "registry": (
        Annotated[
            Path | None,
            _common_option(
                help="The registry to use; else STACKCTL_REGISTRY, else the nearest in a parent folder.", metavar="DIR"
            ),
        ],
        None,
    ),
    "json_mode": (Annotated[bool, _common_option("--json", help="One JSON document on stdout.")], False),
    "quiet": (Annotated[bool, _common_option("--quiet", "-q", help="Print only the essential name.")], False),
    "debug": (Annotated[bool, _common_option("--debug", help="Show the traceback of an error.")], False),
}


@dataclasses.dataclass(frozen=True)
class Context:
    """A command's surroundings."""

    output: Output
    registry_option: Path | None

    @functools.cached_property
    def registry(self) -> Registry:
        """The registry in use; an error with a hint when there is none."""
        from stackctl.registry.store import Registry

        opened = Registry.open(self.registry_option)
        opened.fetch_base = _fetch_base
        opened.show_reading = functools.partial(share_progress, self.output)
        return opened

    def base_folder(self, base: Base) -> Path:
        """The folder with a base's files, fetched or converted again if they are gone."""
        from stackctl.engine.base.folder import base_folder

        return base_folder(base, self.registry, self.output.status)


def _fetch_base(repo: str, revision: str | None, say: Say) -> tuple[Path, str]:
    from stackctl.hub.client import download_base

    return download_base(repo, revision, say)


class Current:
    """The command that is running, so that the outermost error handler knows how to speak."""

    output = Output()
    debug = False
    path = "stackctl"
    """The command as it is typed, without its arguments."""
    registry: Path | None = None
    """What was typed for ``--registry``."""

    @classmethod
    def parse(cls, command: Any, context: Any, words: list[str]) -> None:
        """Take ``--json``, ``--quiet`` and ``--debug`` from a command line in which all else may be wrong.

        What is wrong with it is told as they say, so they are known first. Each level of a command line is parsed by
        its own rules, the innermost last: only there is it known that in ``-m --json`` a message was meant.
        """
        cls.path = context.command_path
        switches = {
            name for parameter in command.get_params(context) if getattr(parameter, "is_flag", False)
            for name in (*parameter.opts, *parameter.secondary_opts)
        }  # fmt: skip
        parser = command.make_parser(context)
        parser.ignore_unknown_options = parser.allow_interspersed_args = True
        if hasattr(command, "commands"):
            for key, names in _SPEAKING.items():
                parser.add_option(None, names, dest=key, action="store_const", const=True)
        strict, context.resilient_parsing = context.resilient_parsing, True
        try:
            heads = [word.partition("=")[0] for word in words]  # at --tree=x the parser would stop
            found, _, _ = parser.parse_args(
                [head if head in switches else word for head, word in zip(heads, words, strict=True)]
            )
        finally:
            context.resilient_parsing = strict
        json_mode, quiet, cls.debug = (bool(found.get(key)) for key in _SPEAKING)
        cls.output = make_output(json_mode=json_mode, quiet=quiet)


_SPEAKING = {"json_mode": ["--json"], "quiet": ["--quiet", "-q"], "debug": ["--debug"]}
"""The common options that say how a command speaks."""


class Page(HelpPage):
    """What stackctl's commands and groups have in common."""

    def parse_args(self, context: Any, args: list[str]) -> list[str]:
        Current.parse(self, context, args)
        parsed: list[str] = super().parse_args(context, args)  # type: ignore[misc]
        return parsed


class Command(Page, TyperCommand):
    """A command of stackctl."""

    def parse_args(self, context: Any, args: list[str]) -> list[str]:
        """Parse the words behind a command.

        Raises:
            Usage: an option stands where another one's value should. A text may look like one: ``-m --json``.
        """
        options = {name: p for p in self.get_params(context) for name in (*p.opts, *p.secondary_opts)}
        words = iter(args[: args.index("--")] if "--" in args else args)
        for word in words:
            option = options.get(word)
            if option is None or getattr(option, "is_flag", False):
                continue
            value = next(words, "")
            if value in options and getattr(option.type, "func", None) is not typed_text:
                Current.output = make_output(json_mode="--json" in args, quiet=not {"-q", "--quiet"}.isdisjoint(args))
                raise Usage(
                    f"{word} needs a value, and {value} is the next option", hint=f"{context.command_path} --help"
                )
        return super().parse_args(context, args)


class Group(Page, TyperGroup):
    """A group of commands: stackctl itself, and ``stackctl base``."""

    def resolve_command(self, context: Any, arguments: list[str]) -> Any:
        """The command that was typed.

        Raises:
            Usage: there is none of that name.
        """
        name = arguments[0]
        if name not in self.commands and not name.startswith("-") and not context.resilient_parsing:
            shown = [known for known, inner in self.commands.items() if not inner.hidden]
            raise Usage(
                f"there is no command '{name}'", hint=did_you_mean(name, shown, f"{context.command_path} --help")
            )
        return super().resolve_command(context, arguments)


def command(
    name: str, *, example: str, panel: str | None = None, hidden: bool = False
) -> Callable[[Callable[..., Result | None]], Callable[[typer.Typer], None]]:
    """Make a function a command, and what is called so from then on adds it to an app.

    The function gets a :class:`Context` first, and the common options are added to its own. A parameter whose type is a
    dataclass is a group of options that several commands have: one for each field. ``example`` is what the help ends
    with: one or more lines as one types them, each beginning with ``stackctl``.
    """

    def made(function: Callable[..., Result | None]) -> Callable[[typer.Typer], None]:
        def add_to(app: typer.Typer) -> None:
            own, groups = _options(function)

            @functools.wraps(function)
            def run(**values: Any) -> None:
                common = {key: values.pop(key) for key in _COMMON}  # of these, Current has read all but the registry
                output = Current.output
                for key, group in groups.items():
                    values[key] = group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
                Current.registry = common["registry"]
                result = function(Context(output, Current.registry), **values)
                if result is not None:
                    output.emit(result)
                    if result.exit_code:
                        raise typer.Exit(result.exit_code)

            added = [
                inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
                for key, (annotation, default) in _COMMON.items()
            ]
            for parameter in [*own, *added]:
                _name_in_capitals(parameter)
                _off_unless_typed(parameter)
                read_words(parameter)
            run.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
            run.__annotations__ = {p.name: p.annotation for p in [*own, *added]}
            add = app.command(
                name, cls=Command, epilog=example, rich_help_panel=panel, hidden=hidden, no_args_is_help=False
            )
            add(run)

        return add_to

    return made


def _options(function: Callable[..., Any]) -> tuple[list[inspect.Parameter], dict[str, Any]]:
    """The options of a command, and of these the groups: the type of each by the name of its parameter."""
    hints = get_type_hints(function, include_extras=True)
    options, groups = [], {}
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        hint = hints.get(parameter.name, parameter.annotation)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            groups[parameter.name] = hint
            types = get_type_hints(hint, include_extras=True)
            fields, own = inspect.signature(hint).parameters.values(), inspect.get_annotations(hint)
            found = [(field, types[field.name]) for field in sorted(fields, key=lambda field: field.name not in own)]
        else:
            found = [(parameter, hint)]
        options += [p.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=kind) for p, kind in found]
    return options, groups


def _name_in_capitals(parameter: inspect.Parameter) -> None:
    """What an argument is called in the help and in errors: ``NAME``, or ``[NAME]`` when it may be left out."""
    for info in getattr(parameter.annotation, "__metadata__", ()):
        if isinstance(info, ArgumentInfo) and info.metavar is None:
            name = parameter.name.upper()
            info.metavar = name if parameter.default is inspect.Parameter.empty else f"[{name}]"


def _off_unless_typed(parameter: inspect.Parameter) -> None:
    """A switch that is off has one name, where typer would add ``--no-name``."""
    for info in getattr(parameter.annotation, "__metadata__", ()):
        if parameter.default is False and isinstance(info, OptionInfo) and info.default is ...:  # it was given no name
            info.param_decls = ("--" + parameter.name.replace("_", "-"),)
