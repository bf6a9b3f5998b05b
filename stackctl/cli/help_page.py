"""The help of a command: usage, what it does, arguments and options in groups of two columns, examples last.

Typer's own page has six columns; the one with the text is 20 characters wide for ``train`` on a terminal of 80. The
lines are laid out by the formatter that comes with it; what stands in them is said here, and in the reference
(``tools/reference.py``) it is the same.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

from stackctl.render.terminal import styled

COMMON = "Common"
"""The group of options that every command has; it comes last."""
WIDTH = 100
"""Columns of the page on a wide terminal: longer lines are harder to read."""
_LABEL = 30
"""Columns of the longest label that has its text beside it, and not below it."""
_KINDS = {"int": "N", "int range": "N", "float": "NUMBER", "float range": "NUMBER", "path": "PATH"}

Row = tuple[str, str]


class HelpPage:
    """Mixed into typer's commands and groups. ``epilog`` are the examples, one a line, as one types them."""

    help: str | None
    epilog: str | None

    def format_help(self, context: Any, formatter: Any) -> None:
        formatter.write_usage("", usage(self, context.command_path), prefix=styled("Usage:", "1", sys.stdout))
        formatter.write_paragraph()
        formatter.write_text(inspect.cleandoc(self.help or ""))
        groups = _groups(self, context)
        width = max((len(label) for rows in groups.values() for label, _ in rows if len(label) <= _LABEL), default=0)
        for title, rows in groups.items():
            formatter.write_paragraph()
            formatter.write(styled(title, "1", sys.stdout) + "\n")
            with formatter.indentation():
                shown = [(styled(label, "36", sys.stdout) + " " * (width - len(label)), text) for label, text in rows]
                formatter.write_dl(shown, col_max=width)
        examples = (self.epilog or "").splitlines()
        title = styled("Examples" if len(examples) > 1 else "Example", "1", sys.stdout)
        formatter.write("\n" + "\n".join([title, *examples]) + "\n")


def usage(command: Any, path: str) -> str:
    """One line: ``stackctl compose EXPR [OPTIONS]``."""
    arguments = [p.metavar for p in command.params if p.param_type_name == "argument"]
    return " ".join([path, *(["COMMAND"] if hasattr(command, "commands") else arguments), "[OPTIONS]"])


def _groups(command: Any, context: Any) -> dict[str, list[Row]]:
    """Title to rows: arguments, commands, options by their panel, and last those that every command has."""
    groups: dict[str, list[Row]] = {"Arguments": []}
    for name in command.list_commands(context) if hasattr(command, "commands") else ():
        inner = command.get_command(context, name)
        if not inner.hidden:
            groups.setdefault(inner.rich_help_panel or "Commands", []).append((name, first_paragraph(inner.help)))
    groups["Options"] = []
    common = []
    for parameter in command.get_params(context):
        if parameter.hidden:
            continue
        if parameter.param_type_name == "argument":
            groups["Arguments"].append((argument_label(parameter.metavar), parameter.help or ""))
        elif parameter.name == "help" or parameter.rich_help_panel == COMMON:
            common.append((option_label(parameter), option_text(parameter)))
        else:
            title = parameter.rich_help_panel or "Options"
            groups.setdefault(title, []).append((option_label(parameter), option_text(parameter)))
    groups[COMMON] = common
    return {title: rows for title, rows in groups.items() if rows}


def first_paragraph(text: str | None) -> str:
    """What a command does, in a line."""
    return " ".join(inspect.cleandoc(text or "").split("\n\n")[0].split())


def argument_label(metavar: str) -> str:
    """``[WHAT...]`` as ``WHAT...``: the brackets of what may be left out stand in the usage line."""
    return metavar.replace("[", "", 1).replace("]", "", 1) if metavar.startswith("[") else metavar


def option_label(option: Any) -> str:
    """``-p, --prompt TEXT``; a switch that can be given both ways as ``--pack, --no-pack``."""
    names = sorted([*option.opts, *option.secondary_opts], key=lambda name: name.startswith("--"))
    kind = "" if option.is_flag else f" {option.metavar or _kind(option)}"
    return ", ".join(names) + kind


def _kind(option: Any) -> str:
    if option_choices(option):
        return str(option.name).rstrip("_").upper()
    return _KINDS.get(option.type.name, "TEXT")


def option_choices(option: Any) -> list[str]:
    """The words that an option takes; empty when it takes any."""
    return [str(choice) for choice in getattr(option.type, "choices", ())]


def option_default(option: Any) -> str:
    """What holds when the option is not given; empty when there is nothing to say."""
    shown = option.show_default if isinstance(option.show_default, str) else option.default
    if option.secondary_opts:
        return {"True": "on", "False": "off"}.get(str(shown), "")
    return "" if shown in (None, False, "", ()) or callable(shown) else str(shown)


def option_text(option: Any) -> str:
    """What an option means, its choices and its default."""
    facts = [
        ", ".join(option_choices(option)),
        *([f"default {default}"] if (default := option_default(option)) else []),
    ]
    told = "; ".join(fact for fact in facts if fact)
    return f"{option.help or ''} [{told}]" if told else option.help or ""
