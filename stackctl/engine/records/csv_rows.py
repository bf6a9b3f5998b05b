"""CSV and TSV: a row is a record, its fields texts.

Read by Python's own ``csv``: the reader of ``datasets`` is pandas', which makes a number of "007" and nothing of "NA".
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from stackctl.core.errors import Usage
from stackctl.engine.records.raw_lines import Seen, lines_of
from stackctl.engine.records.shapes import LABELS, SHAPE_HINT
from stackctl.engine.records.types import BadRecord

_LONGEST = 2**31 - 1


def csv_rows(
    path: Path, name: str, seen: Seen, *, separators: str, knows: Callable[[Sequence[str]], bool]
) -> Iterator[tuple[int, Any]]:
    """The rows below the header, by the line in which each begins; an empty field is an absent key.

    Of several ``separators`` the first is taken by which ``knows`` knows the header, or else the first.

    Raises:
        Usage: there is no header, or it names a column twice.
    """
    csv.field_size_limit(_LONGEST)
    lines = (line.decode() for line in lines_of(path, name, seen, ends=True))  # a quoted field may have some in it
    first = next(lines, "")
    headers = {separator: _header(first, separator) for separator in separators}
    known = (separator for separator, header in headers.items() if knows(header))
    separator = next(known, separators[0])
    header = headers[separator]
    if len(set(header)) < len(header) or not any(header):
        raise Usage(f"{name} has no header of column names, each there once, on its first line", hint=SHAPE_HINT)
    rows = csv.reader(lines, delimiter=separator, strict=True)
    while True:
        number = rows.line_num + 2
        try:
            row = next(rows, None)
        except csv.Error as error:
            yield number, BadRecord(f"not valid CSV: {error}")
            return
        if row is None:
            return
        if not row:
            continue
        if len(row) != len(header):
            yield number, BadRecord(f"has {len(row)} fields, and the header {len(header)}")
            continue
        yield number, {key: _value(key, value) for key, value in zip(header, row, strict=True) if value != ""}


def _value(key: str, text: str) -> str | bool:
    """A field's text; a label is a truth value, where it is one in words."""
    return {"true": True, "false": False}.get(text.lower(), text) if key in LABELS else text


def _header(line: str, separator: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=separator, strict=True), [])
    except csv.Error:
        return []
