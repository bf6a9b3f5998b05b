"""Packages that are installed and cannot be imported: cut off by a full disk, removed in part, of another version."""

from __future__ import annotations

import importlib.metadata
import shlex
import sys
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from stackctl.core.errors import Failed, first_line

_COMPILED = (EOFError, ValueError, TypeError)
"""What unpacking a compiled module that is damaged raises (Python's marshal)."""

_SETTINGS = "huggingface_hub/constants.py"
"""Where the environment is read, and nothing is done with it."""


def import_error(error: BaseException) -> Failed | None:
    """What could not be imported, and how to have it again; None where something else went wrong."""
    for one in _causes(error):
        if isinstance(one, _COMPILED) and (file := _last_local(one, "bytecode_path")):
            return Failed(
                f"{file} is damaged ({first_line(one)})",
                hint=f"remove it, and Python makes it anew: rm {shlex.quote(file)}",
            )
        if isinstance(one, SyntaxError) and (module := _last_local(one, "fullname")):
            return Failed(f"{one.filename} is damaged (line {one.lineno}: {one.msg})", hint=_reinstall(module))
        if isinstance(one, ValueError) and _comes_from(one, _SETTINGS):
            return Failed(
                f"huggingface_hub cannot be imported with these settings ({first_line(one)})",
                hint="correct or unset HF_ENDPOINT, or what else in the environment begins with HF_",
            )
        if isinstance(one, ImportError):
            name = _in_package(one.path) or one.name or ""
            return Failed(f"{name or 'a package'} cannot be imported ({first_line(one)})", hint=_reinstall(name))
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error that was raised and those that it says it comes from, the first one of them first."""
    found: list[BaseException] = []
    while error not in found:
        found.append(error)
        if error.__cause__ is None:
            break
        error = error.__cause__
    return reversed(found)


def _in_package(path: str | None) -> str | None:
    """The module of a compiled library, of whose name Python tells the last part alone; None of any other file."""
    if path is None or not path.endswith(tuple(EXTENSION_SUFFIXES)):
        return None
    places = (Path(path).relative_to(place) for place in sys.path if place and Path(path).is_relative_to(place))
    inside = min(places, key=lambda place: len(place.parts), default=None)
    return ".".join([*inside.parts[:-1], inside.name.partition(".")[0]]) if inside else None


def _comes_from(error: BaseException, file: str) -> bool:
    """Whether a file, by the end of its name, is among those that an error came through."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename.endswith(file):
            return True
        trace = trace.tb_next
    return False


def _last_local(error: BaseException, name: str) -> str | None:
    """A variable of the import system, if that raised the error: the last one of its frames that has it.

    ``fullname`` is the module that was being read, ``bytecode_path`` its compiled file.
    """
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    for frame in reversed(frames):
        if not frame.f_code.co_filename.startswith("<frozen importlib"):
            return None
        if isinstance(value := frame.f_locals.get(name), str):
            return value
    return None


def _reinstall(module: str) -> str:
    """The command that installs the package of a module again; or anew where there is none of it."""
    top = module.partition(".")[0]
    packages = importlib.metadata.packages_distributions().get(top)
    if packages:
        return f"install it again: pip install --force-reinstall --no-deps {packages[0]}"
    return f"pip install {top}" if top.isidentifier() else "pip install --force-reinstall stackctl-lora"
