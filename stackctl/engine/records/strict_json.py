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
    """Strict JSON: no NaN, no Infinity, no lone surrogates."""
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        _explain_json(data, error)


def _explain_json(data: bytes, error: Exception) -> NoReturn:
    """The same error in the words of the standard library, which name the column, where it sees one too."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    line = column = None
    try:
        json.loads(data, parse_constant=refuse)
        message = str(error) if isinstance(error, msgspec.ValidationError) else "half a character (a lone surrogate)"
    except json.JSONDecodeError as standard:
        raise BadRecord(f"not valid JSON: {standard.msg}", line=standard.lineno, column=standard.colno) from None
    except RecursionError:
        message = "nested too deeply"
    except ValueError as standard:
        message = str(standard)
    if position := re.search(r" \(byte (\d+)\)", str(error)):
        before = data[: int(position[1])]
        line, column = before.count(b"\n") + 1, len(before.rpartition(b"\n")[2].decode(errors="ignore")) + 1
    raise BadRecord(f"not valid JSON: {message}", line=line, column=column)
