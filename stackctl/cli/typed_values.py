"""What stands behind an option, read: paths as everywhere, texts as UTF-8."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import typer

from stackctl.storage.paths import typed_path


def path_parser(label: str) -> Callable[[str], Path]:
    """A parser of paths, with ``~`` for the home: within ``--out=~/x`` and in quotes no shell replaces it."""

    def path(text: str) -> Path:  # typer calls the type by its name
        return typed_path(text, what=label)

    return path


def typed_text(value: str) -> str:
    """A parser of options that are texts and name no file: a shell passes any bytes on, models read UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise typer.BadParameter("it is not UTF-8") from None
    return value
