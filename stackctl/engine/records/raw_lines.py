"""A file's lines as UTF-8, whatever it is packed and written in."""

from __future__ import annotations

import bz2
import gzip
import io
import itertools
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from stackctl.core.errors import Usage

Seen = Callable[[float], None]
_PACKED: dict[bytes, Callable[[BinaryIO], Any]] = {
    b"\x1f\x8b": lambda raw: gzip.GzipFile(fileobj=raw),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
}
"""What packed files begin with."""
_WIDE = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
"""Byte-order marks of texts in another width; the longer come first."""
_PACKED_SUFFIXES = (".gz", ".bz2", ".xz")


def suffix_of(path: Path) -> str:
    """How a file's name ends, without what says that it is packed."""
    return (path.with_suffix("") if is_packed(path) else path).suffix.lower()


def is_packed(path: Path) -> bool:
    """By its name."""
    return path.suffix.lower() in _PACKED_SUFFIXES


def lines_of(path: Path, name: str, seen: Seen = lambda _: None, *, ends: bool = False) -> Iterator[bytes]:
    """A file's lines without a byte-order mark, known to be UTF-8, and with ``ends`` as they end in the file.

    gzip, bzip2 and xz are unpacked, UTF-16 and UTF-32 with a byte-order mark made into UTF-8.

    Raises:
        Usage: it is neither, or not whole.
    """
    size = max(path.stat().st_size, 1)
    with path.open("rb") as raw:
        lines = _parted(_lines(raw, name))
        for number in itertools.count(1):
            try:
                line = next(lines, None)
            except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, OSError) as error:
                raise Usage(f"{name} cannot be unpacked ({error})", hint="pack it again, or give it unpacked") from None
            if line is None:
                return
            seen(min(raw.tell() / size, 1.0))
            line = line if ends else line.removesuffix(b"\n").removesuffix(b"\r")
            yield line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _lines(raw: BinaryIO, name: str) -> Iterator[bytes]:
    """Lines with their newline."""
    stream: Any = raw
    start = raw.read(6)
    raw.seek(0)
    for magic, unpack in _PACKED.items():
        if start.startswith(magic):
            stream = io.BufferedReader(unpack(raw))
            start = stream.peek(6)[:6]
    for mark, encoding in _WIDE.items():
        if start.startswith(mark):
            yield from _narrowed(io.TextIOWrapper(stream, encoding=encoding, newline="\n"), name, encoding)
            return
    if len(start) >= 4 and not (any(start[::2]) and any(start[1::2])):  # every other byte is NUL, which is UTF-8, too
        raise Usage(f"{name} is UTF-16 or UTF-32 without a byte-order mark", hint="save it as UTF-8")
    for number, line in enumerate(stream, 1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            where = f"byte 0x{line[error.start]:02x} on line {number}"
            raise Usage(f"{name} is not UTF-8 ({where})", hint="save it as UTF-8") from None
        yield line


def _parted(lines: Iterator[bytes]) -> Iterator[bytes]:
    """Of a text without any newline the lines that end with a carriage return, as spreadsheets still write for Macs."""
    first = next(lines, b"")
    if first.endswith(b"\n") or b"\r" not in first:
        yield from (first,) if first else ()
        yield from lines
    else:
        yield from first.splitlines(keepends=True)


def _narrowed(text: IO[str], name: str, encoding: str) -> Iterator[bytes]:
    try:
        for line in text:
            yield line.encode()
    except UnicodeError:
        raise Usage(f"{name} begins as {encoding.upper()} and is none", hint="save it as UTF-8") from None
