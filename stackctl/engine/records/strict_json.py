"""Strict JSON whose errors name line and column."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import msgspec

from stackctl.engine.records.types import BadRecord


def parse_lines(lines: Iterable[bytes]) -> Iterator[tuple[int, Any]]:
    """Each line's value, or what is wrong with it. Lines end with a newline only: U+2028 may stand in a string."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield number, parse_json(line)
            except BadRecord as error:
                yield number, error


def parse_json(data: bytes) -> Any:
    """Strict JSON: no NaN, no Infinity, no lone surrogates, and no key twice, of which one value would be dropped."""
    try:
        value = msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        _explain_json(data, error)
    if not _is_whole(data, value):
        json.loads(data, object_pairs_hook=_each_once)
    return value


def _is_whole(data: bytes, value: Any) -> bool:
    """Whether nothing was dropped, as far as its quotation marks tell: written otherwise, all of them may be there."""
    if rb"\u0022" in data:  # a quotation mark that is none before it is decoded
        return False
    try:
        return data.count(b'"') == msgspec.json.encode(value).count(b'"')
    except (OverflowError, RecursionError):  # a number of more than 64 bits
        return False


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise BadRecord(f"the key '{twice[:80]}' is there twice")
    return found


def _explain_json(data: bytes, error: Exception) -> NoReturn:
    """The same error in the words of the standard library, which name the column, where it sees one too."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    line = column = None
    try:
        json.loads(data.decode(errors="surrogatepass"), parse_constant=refuse)  # of bytes it drops a byte-order mark
        too_large = isinstance(error, msgspec.ValidationError)
        message = "a number too large for 64 bits" if too_large else "half a character (a lone surrogate)"
    except json.JSONDecodeError as standard:
        marked = "BOM" in standard.msg
        what = "a byte-order mark that is not at the beginning of the file" if marked else standard.msg
        raise BadRecord(f"not valid JSON: {what}", line=standard.lineno, column=standard.colno) from None
    except RecursionError:
        message = "nested too deeply"
    except ValueError as standard:
        message = "a number of thousands of digits" if "digits" in str(standard) else str(standard)
    if position := re.search(r" \(byte (\d+)\)", str(error)):
        before = data[: int(position[1])]
        line, column = before.count(b"\n") + 1, len(before.rpartition(b"\n")[2].decode(errors="ignore")) + 1
    raise BadRecord(f"not valid JSON: {message}", line=line, column=column)
