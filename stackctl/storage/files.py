"""Files and folders: reading them within bounds, listing, measuring and removing them; JSON on one line."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

from stackctl.core.errors import Incompatible, NotFound, StackctlError, Usage

MAX_TEXT_BYTES = 32 << 20
"""More than any file that people write or that describes a model; parsed, each byte may take twenty of memory."""
_FIRST = 64 << 10


def read_bounded(path: Path) -> bytes:
    """A file of reasonable size, whole; a pipe is read to its end, and ``/dev/zero`` is not.

    Raises:
        Usage: it has more than ``MAX_TEXT_BYTES``. OSError: as for any file.
    """
    with path.open("rb") as stream:
        data = stream.read(_FIRST)
        if len(data) == _FIRST:  # memory for all that might come costs more than reading what most files have
            data += stream.read(MAX_TEXT_BYTES + 1 - _FIRST)
    if len(data) > MAX_TEXT_BYTES:
        raise Usage(f"{path} is larger than {MAX_TEXT_BYTES >> 20} MiB", hint="this is another kind of file")
    return data


def read_json(path: Path, *, missing: str | None = None, broken: str | None = None) -> dict[str, Any]:
    """The JSON object in a file; ``missing`` and ``broken`` are hints for when it is not there, or is none.

    Raises:
        NotFound, Incompatible: no such file, or not an object.
    """
    if path.exists() and not path.is_file():  # a pipe is waited for, and some devices never end
        raise Incompatible(f"{path} is not a regular file", hint=broken)
    try:
        value = json.loads(read_bounded(path).decode("utf-8-sig"))
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
        raise NotFound(f"{path} does not exist", hint=missing) from None
    except (ValueError, RecursionError) as error:
        raise Incompatible(f"{path} is not valid JSON ({error})", hint=broken) from None
    if not isinstance(value, dict):
        raise Incompatible(f"{path} is not a JSON object", hint=broken)
    return value


def read_json_if_any(path: Path) -> dict[str, Any]:
    """The JSON object in a file that only helps; empty where there is none that can be read."""
    try:
        return read_json(path) if path.is_file() else {}
    except (OSError, StackctlError):
        return {}


def children(folder: Path, beginning: str = "") -> list[Path]:
    """What is in a folder and has a name that begins so, by name; nothing in one that is gone, or is none."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as found:
        return [folder / name for name in sorted(each.name for each in found if each.name.startswith(beginning))]
    return []


def tree_bytes(path: Path) -> int:
    """The bytes of a file or of all files of a folder; links count as themselves."""
    found = [path] if path.is_symlink() or not path.is_dir() else []
    if not found:
        found = [Path(folder, name) for folder, folders, names in os.walk(path) for name in [*folders, *names]]
    size = 0
    for each in found:
        with contextlib.suppress(OSError):  # gone meanwhile
            info = each.lstat()
            size += 0 if stat.S_ISDIR(info.st_mode) else info.st_size
    return size


def remove_tree(path: Path) -> None:
    """Remove a file, a link or a folder; a link's target is never followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_ROOM = 2**20
"""Free bytes under which a library that only says that it could not write has met a full disk."""


def disk_is_full(error: BaseException, folder: Path) -> bool:
    """Whether something could not be written into ``folder`` for want of space, also where a library hides why."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _NO_ROOM
    if any(os.strerror(number) in str(error) for number in _NO_ROOM):  # safetensors repeats the system's words
        return True
    with contextlib.suppress(OSError):
        return shutil.disk_usage(folder).free < _ROOM
    return False


def human_bytes(size: float) -> str:
    """``12.3 MB``: decimal units, as disks and the Hub count."""
    for unit in ("B", "kB", "MB", "GB"):
        if round(size, 1) < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


_SEPARATORS = str.maketrans({sign: f"\\u{ord(sign):04x}" for sign in "\x85\u2028\u2029"})
"""Ends of lines for Unicode, and so for Python's ``str.splitlines``, that JSON leaves as they are."""


def json_line(value: Any) -> str:
    """A value as JSON on one line, whoever splits it into lines.

    Raises:
        ValueError: a number in it is not finite.
    """
    return json.dumps(value, ensure_ascii=False, allow_nan=False).translate(_SEPARATORS)
