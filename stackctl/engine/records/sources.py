"""What stands in a file or a Hub data set, value by value, before it is known to be a record.

Values are read as they are asked for, so that memory holds a few of them at a time. Only a JSON list is read whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from stackctl.core.errors import HubFailure, NotFound, Usage, first_line
from stackctl.engine.records.shapes import COLUMNS, SHAPE_HINT, shape_of
from stackctl.engine.records.strict_json import parse_json, parse_lines
from stackctl.engine.records.types import BadRecord, Unit
from stackctl.storage import files

KINDS_HINT = "give JSON Lines (.jsonl), JSON (.json), Parquet (.parquet), text (.txt) or a Hub data set (org/name)"
_ROWS = 1024
"""Rows of a table held at a time."""

Values = Iterator[tuple[int, Any]]
"""Numbers and values; a :class:`BadRecord` in place of a value says what is wrong with it."""
Seen = Callable[[float], None]


@dataclass(frozen=True)
class Source:
    """Where records come from. ``values`` begins anew with each call, and reports the share (0 to 1) that was read."""

    name: str
    sha256: str
    unit: Unit
    values: Callable[[Seen], Values]
    path: Path | None = None
    stamp: tuple[int, ...] = ()

    def changed(self) -> bool:
        """Whether a file is another than when it was opened."""
        return self.path is not None and _stamp(self.path) != self.stamp


def _of_file(path: Path, name: str, unit: Unit, values: Callable[[Seen], Values]) -> Source:
    stamp = _stamp(path)
    return Source(name, files.sha256_file(path), unit, values, path, stamp)


def _stamp(path: Path) -> tuple[int, ...]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def open_json_lines(path: Path, name: str) -> Source:
    return _of_file(path, name, "line", lambda seen: parse_lines(lines_of(path, name, seen)))


def open_json(path: Path, name: str) -> Source:
    """A list of records, or JSON Lines under another suffix."""
    data = b"\n".join(lines_of(path, name))
    start = data.lstrip()[:1]
    if start not in (b"[", b"{"):
        if not start:
            raise Usage(f"{name} is empty", hint=SHAPE_HINT)
        raise Usage(f"{name} is neither a JSON list of records nor JSON Lines", hint=SHAPE_HINT)
    try:
        value = parse_json(data)
    except BadRecord as error:
        if start == b"{":
            return _of_file(path, name, "line", lambda seen: parse_lines(lines_of(path, name, seen)))
        where = f", line {error.line}" if error.line else ""
        where += f", column {error.column}" if error.column else ""
        raise Usage(f"{name}{where}: {error}", hint="repair the JSON, or give one record per line") from None
    if isinstance(value, dict):
        if shape_of(value) is None:
            raise Usage(f"{name} is one JSON object, not a list of records", hint=SHAPE_HINT)
        value = [value]
    return _of_file(path, name, "record", lambda seen: enumerate(value, 1))


def open_parquet(path: Path, name: str) -> Source:
    return _of_file(path, name, "record", lambda seen: _parquet_rows(path, name, seen))


def _parquet_rows(path: Path, name: str, seen: Seen) -> Values:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    number = 0
    with path.open("rb") as stream:
        try:
            file = pq.ParquetFile(stream)
            known = [column for column in file.schema_arrow.names if column in COLUMNS]
            for batch in file.iter_batches(_ROWS, columns=known or None):
                for row in batch.to_pylist():
                    number += 1
                    yield number, _without_nulls(row)
                seen(number / file.metadata.num_rows)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise Usage(f"{name} is not a Parquet file that can be read ({reason})", hint=KINDS_HINT) from None


def open_text(path: Path, name: str) -> Source:
    """Documents separated by blank lines."""
    return _of_file(path, name, "line", lambda seen: _documents(lines_of(path, name, seen)))


def _documents(raw: Iterator[bytes]) -> Values:
    lines: list[str] = []
    number = 0
    for number, line in enumerate((line.decode() for line in raw), 1):
        if line.strip():
            lines.append(line.removesuffix("\r"))
        elif lines:
            yield number - len(lines), {"text": "\n".join(lines)}
            lines = []
    if lines:
        yield number + 1 - len(lines), {"text": "\n".join(lines)}


def open_hub_dataset(repo: str, split: str | None) -> Source:
    import datasets
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    label = f"{repo}:{split}" if split else repo
    try:
        dataset = datasets.load_dataset(repo, split=split or "train")
    except DatasetNotFoundError:
        raise NotFound(
            f"there is no file and no Hub data set {repo}",
            hint="check the name; a private or gated data set needs a token (hf auth login)",
        ) from None
    except (ValueError, DatasetsError) as error:
        raise Usage(
            f"the Hub data set {label} cannot be read ({first_line(error)})", hint="name a split: org/name:split"
        ) from None
    except (OSError, RuntimeError) as error:
        raise HubFailure(
            f"the Hub data set {label} could not be fetched ({first_line(error)})",
            hint="check the network; if a file was meant, it does not exist",
        ) from error
    known = [column for column in dataset.column_names if column in COLUMNS]
    rows = dataset.select_columns(known) if known else dataset
    sha256 = files.sha256_bytes(f"{label}@{dataset._fingerprint}".encode())

    def values(seen: Seen) -> Values:
        for number, row in enumerate(rows, 1):
            yield number, _without_nulls(row)
            seen(number / len(rows))

    return Source(label, sha256, "record", values)


def lines_of(path: Path, name: str, seen: Seen = lambda _: None) -> Iterator[bytes]:
    """A file's lines without their newline and without a byte-order mark, known to be UTF-8."""
    size = max(path.stat().st_size, 1)
    done = 0
    with path.open("rb") as stream:
        _refuse_utf16(stream, name)
        for number, raw in enumerate(stream, 1):
            try:
                raw.decode("utf-8")
            except UnicodeDecodeError as error:
                where = f"byte 0x{raw[error.start]:02x} on line {number}"
                raise Usage(f"{name} is not UTF-8 ({where})", hint="save it as UTF-8") from None
            done += len(raw)
            seen(done / size)
            line = raw.removesuffix(b"\n")
            yield line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _refuse_utf16(stream: BinaryIO, name: str) -> None:
    start = stream.read(2)
    if start in (b"\xff\xfe", b"\xfe\xff"):
        raise Usage(f"{name} is UTF-16, not UTF-8 (byte 0x{start[0]:02x} on line 1)", hint="save it as UTF-8")
    stream.seek(0)


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a table has every column: a null is an absent key."""
    return {key: value for key, value in row.items() if value is not None}
