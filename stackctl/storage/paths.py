"""Paths: as they were typed, as they are kept, and where caches lie."""

from __future__ import annotations

import contextlib
import itertools
import os
from pathlib import Path

from stackctl.core.errors import Failed, NotFound, Usage, closest

_LOOKED_AT = 1000
"""Names in a folder that a mistyped one is compared with."""


def typed_path(text: str, folder: Path | None = None, what: str = "the path") -> Path:
    """A path as somebody typed it, with ``~`` for a home where there is one; in ``folder`` unless it is absolute.

    Raises:
        Usage: it is empty, as ``"$NAME"`` is where nothing was set, and would mean the working directory.
    """
    if not text:
        raise Usage(f"{what} is empty", hint="give a path; the working directory is called '.'")
    path = Path(text)
    with contextlib.suppress(RuntimeError):  # nobody of that name
        path = path.expanduser()
    return path if folder is None else folder / path


def existing_path(path: Path, what: str) -> Path:
    """``path`` if something is there.

    Raises:
        NotFound: nothing is.
    """
    if not path.exists():
        raise missing_path(path, what)
    return path


def missing_path(path: Path, what: str = "") -> NotFound:
    """The error that something typed is not there; its hint names what is called nearly so beside it."""
    if path.is_symlink():
        goal = path.readlink()
        return NotFound(f"{what} {path} is a link to {goal}, which is not there".strip(), hint="correct the link")
    near = None
    with contextlib.suppress(OSError), os.scandir(path.parent) as found:
        near = closest(path.name, [each.name for each in itertools.islice(found, _LOOKED_AT)])
    hint = "check the path; it may be relative to the working directory"
    if "*" in path.name or "?" in path.name:
        near, hint = None, "a pattern is no path: name one file or folder"
    if path.name == "-":
        near, hint = None, "standard input is not read here: name a file"
    return NotFound(
        f"{what} {path} does not exist".strip(), hint=f"did you mean '{path.with_name(near)}'?" if near else hint
    )


def portable_path(path: Path, root: Path) -> str:
    """Relative to a registry's ``root`` when both lie in one project, so that the project can move; else absolute."""
    return os.path.relpath(path, root) if path.is_relative_to(root.parent) else str(path)


def check_output(path: Path) -> None:
    """Where ``--output`` is to go is known to be possible before anything is computed.

    Raises:
        NotFound, Usage, Failed: there is no such folder, it cannot be written to, or the file's name is a folder's.
    """
    folder = existing_path(Path(os.path.realpath(path)).parent, "the folder")
    if not folder.is_dir():
        raise Usage(f"{folder} is a file, not a folder", hint="name another place: --output FILE")
    if path.is_dir():
        raise Usage(f"--output {path} is a folder", hint="name a file")
    is_device = path.exists() and not path.is_file()
    if not os.access(path if is_device else folder, os.W_OK if is_device else os.W_OK | os.X_OK):
        what = path if is_device else folder
        raise Failed(f"nothing can be written to {what}", hint="check who owns it and its permissions")


def cache_root() -> Path:
    """The folder of caches, which serve every registry of a user and can be made again: models, tokens."""
    if value := os.environ.get("STACKCTL_CACHE"):
        return typed_path(value)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stackctl"
