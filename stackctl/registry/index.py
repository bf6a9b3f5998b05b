"""Rows of all entries of a kind, kept in a cache, so that a question about all of them parses only what is new.

An index is never the truth. A row counts while the file that it was made of is what it was, by its size, its inode and
both its times; a file that changed a moment ago is read each time, because its next change might show in none of them.
What cannot be read, or was made by another stackctl, does not exist. The last of several writers wins, which costs
the others' reading at most.
"""

from __future__ import annotations

import contextlib
import os
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from stackctl import __version__
from stackctl.storage import files
from stackctl.storage.cache_folder import cache_root

Row = TypeVar("Row")
_MADE_BY = f"{__version__} index 1"
_WORTH_KEEPING = 32 << 10
"""Bytes of YAML that are parsed faster than it disturbs anybody: a registry with less has no index."""
_CHECKSUM_BYTES = 4


class _Kept(msgspec.Struct, frozen=True, array_like=True):
    """The state of a file, and the row that was made of it."""

    state: tuple[int, int, int, int]
    row: msgspec.Raw


class _Content(msgspec.Struct, frozen=True, array_like=True):
    """A whole index; ``folder`` is that of the entries."""

    made_by: str
    folder: str
    kept: dict[str, _Kept]


class Rows(Generic[Row]):
    """Rows in the order of their names, each decoded when its turn comes, so that many take little memory."""

    def __init__(self, encoded: dict[str, msgspec.Raw], row: type[Row]) -> None:
        self._encoded = encoded
        self._decoder = msgspec.msgpack.Decoder(row)
        self.names = sorted(encoded)

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Row]:
        return (self._decoder.decode(self._encoded[name]) for name in self.names)


def entry_files(folder: Path) -> Iterator[os.DirEntry[str]]:
    """The files of a folder's entries, in no order."""
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as found:
        yield from (entry for entry in found if entry.name.endswith(".yaml") and not entry.name.startswith("."))


def entry_name(entry: os.DirEntry[str]) -> str:
    return entry.name.removesuffix(".yaml")


def indices_folder() -> Path:
    """Where the indices of every registry are kept."""
    return cache_root() / "index"


def index_path(folder: Path) -> Path:
    """Where the index of a folder of entries is kept."""
    return indices_folder() / f"{files.sha256_bytes(os.fsencode(folder)).removeprefix('sha256:')[:24]}.msgpack"


def read_rows(
    folder: Path, row: type[Row], read: Callable[[str], Row | None], progress: Callable[[float], None]
) -> Rows[Row]:
    """The rows of all entries in a folder: every file that is new or has changed is read before this returns.

    Args:
        read: makes the row of an entry by its name; None when it is gone.
        progress: called with the share, 0 to 1, of what has to be read.

    Raises:
        whatever ``read`` raises; what was read before is kept all the same.
    """
    path, now = index_path(folder), time.time()
    known = _load(path, folder)
    found: dict[str, os.stat_result] = {}
    for entry in entry_files(folder):
        with contextlib.suppress(FileNotFoundError):  # removed this moment, or a link to nothing
            found[entry_name(entry)] = entry.stat()
    kept = {n: known[n] for n, info in found.items() if n in known and known[n].state == files.state(info)}
    encoded = {name: was.row for name, was in kept.items()}
    unread = sorted(found.keys() - kept.keys())
    try:
        for number, name in enumerate(unread):
            progress(number / len(unread))
            made = read(name)
            if made is not None:
                encoded[name] = msgspec.Raw(msgspec.msgpack.encode(made))
                if files.is_settled(found[name], now):
                    kept[name] = _Kept(files.state(found[name]), encoded[name])
    finally:
        learned = sum(found[name].st_size for name in unread if name in kept)
        if learned >= max(_WORTH_KEEPING, sum(info.st_size for info in found.values()) // 1000):
            _save(path, folder, kept)
    progress(1.0)
    return Rows(encoded, row)


def _load(path: Path, folder: Path) -> dict[str, _Kept]:
    with contextlib.suppress(OSError, msgspec.DecodeError):
        data = path.read_bytes()
        content = memoryview(data)[_CHECKSUM_BYTES:]
        if data[:_CHECKSUM_BYTES] == _checksum(content):
            index = msgspec.msgpack.decode(content, type=_Content)
            if (index.made_by, index.folder) == (_MADE_BY, _text(folder)):
                return index.kept
    return {}


def _save(path: Path, folder: Path, kept: dict[str, _Kept]) -> None:
    content = msgspec.msgpack.encode(_Content(_MADE_BY, _text(folder), kept))
    with contextlib.suppress(OSError):  # no cache is no harm
        files.sweep_staging(path.parent)
        files.write_atomic(path, _checksum(content) + content)


def _checksum(content: bytes | memoryview) -> bytes:
    return zlib.crc32(content).to_bytes(_CHECKSUM_BYTES)


def _text(folder: Path) -> str:
    """A path as text that can be written, whatever bytes its name has."""
    return os.fsencode(folder).decode(errors="backslashreplace")
