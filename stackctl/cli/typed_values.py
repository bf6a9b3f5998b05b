"""What stands behind an option, read: paths as everywhere, texts as UTF-8."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import typer
from typer.models import OptionInfo, ParameterInfo

from stackctl.core.errors import Usage
from stackctl.storage.paths import typed_path


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


def typed_text(value: str) -> str:
    """A parser of options that are texts and name no file: a shell passes any bytes on, models read UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise typer.BadParameter("it is not UTF-8") from None
    return value


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
