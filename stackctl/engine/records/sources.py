"""What stands in a file or a Hub data set, value by value, before it is known to be a record.

Values are read as they are asked for, so that memory holds a few of them at a time. Only a JSON list is read whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackctl.core.errors import HubFailure, NotFound, Usage, first_line
from stackctl.engine.records.csv_rows import csv_rows
from stackctl.engine.records.raw_lines import Seen, lines_of
from stackctl.engine.records.shapes import COLUMNS, SHAPE_HINT, is_of_a_shape, shape_of
from stackctl.engine.records.strict_json import parse_json, parse_lines
from stackctl.engine.records.types import BadRecord, Unit
from stackctl.storage.hashes import TEXTS, data_digest, sha256_bytes, sha256_file, texts_in

KINDS_HINT = (
    "give JSON Lines (.jsonl), JSON (.json), Parquet (.parquet), CSV (.csv, .tsv), text (.txt), a folder of texts or a "
    "Hub data set (org/name)"
)
_ROWS = 1024
"""Rows of a table held at a time."""

Values = Iterator[tuple[int, Any]]
"""Numbers and values; a :class:`BadRecord` in place of a value says what is wrong with it."""


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
    return Source(name, sha256_file(path), unit, values, path, stamp)


def _stamp(path: Path) -> tuple[int, ...]:
    stats = [each.stat() for each in (texts_in(path) if path.is_dir() else [path])]
    return tuple(number for stat in stats for number in (stat.st_size, stat.st_mtime_ns, stat.st_ino))


def _each(unit: Unit, values: Callable[[Path, str, Seen], Values]) -> Callable[[Path, str], Source]:
    """What opens a file that has a value for each ``unit``."""
    return lambda path, name: _of_file(path, name, unit, lambda seen: values(path, name, seen))


_json_lines = _each("line", lambda path, name, seen: parse_lines(lines_of(path, name, seen)))


def _open_json_lines(path: Path, name: str) -> Source:
    """A record on each line; a JSON list under this suffix is read as one."""
    if next((line for line in lines_of(path, name) if line.strip()), b"").lstrip()[:1] == b"[":
        return _open_json(path, name)
    return _json_lines(path, name)


def _open_json(path: Path, name: str) -> Source:
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
            return _json_lines(path, name)
        where = f", line {error.line}" if error.line else ""
        where += f", column {error.column}" if error.column else ""
        raise Usage(f"{name}{where}: {error}", hint="repair the JSON, or give one record per line") from None
    if isinstance(value, dict):
        if shape_of(value) is None:
            raise Usage(f"{name} is one JSON object, not a list of records", hint=SHAPE_HINT)
        value = [value]
    return _of_file(path, name, "record", lambda seen: enumerate(value, 1))


def parquet_rows(path: Path, name: str, seen: Seen) -> Values:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    number = 0
    with path.open("rb") as stream:
        try:
            file = pq.ParquetFile(stream)
            known = [column for column in file.schema_arrow.names if column in COLUMNS]
            if twice := next((column for column in known if known.count(column) > 1), None):
                raise Usage(f"{name} has two columns called '{twice}'", hint="rename or drop one of them")
            for batch in file.iter_batches(_ROWS, columns=known or None):
                for row in batch.to_pylist():
                    number += 1
                    yield number, _without_nulls(row)
                seen(number / file.metadata.num_rows)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            what = f"{name} is not a Parquet file that can be read ({first_line(error)})"
            raise Usage(what, hint=KINDS_HINT) from None


def open_folder(path: Path, name: str) -> Source:
    """Texts, each file a document, by name.

    Raises:
        Usage: there are none, or other files of data lie among them.
    """
    paths = texts_in(path)
    others = sorted({p.suffix.lower() for p in path.rglob("*") if p.suffix.lower() in READERS} - set(TEXTS))
    if others:
        raise Usage(f"{name} is a folder with {', '.join(others)} in it", hint="name one of its files")
    if not paths:
        raise Usage(f"{name} is a folder without texts ({', '.join(TEXTS)})", hint=KINDS_HINT)
    return Source(name, data_digest(path), "file", lambda seen: _whole_texts(path, paths, seen), path, _stamp(path))


def _whole_texts(folder: Path, paths: list[Path], seen: Seen) -> Values:
    for number, path in enumerate(paths, 1):
        name = path.relative_to(folder).as_posix()
        text = "\n".join(line.decode() for line in lines_of(path, name))
        yield number, {"text": text} if text.strip() else BadRecord(f"{name} is empty")
        seen(number / len(paths))


def _documents(path: Path, name: str, seen: Seen) -> Values:
    """Documents separated by blank lines."""
    lines: list[str] = []
    number = 0
    for number, line in enumerate((line.decode() for line in lines_of(path, name, seen)), 1):
        if line.strip():
            lines.append(line)
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
    sha256 = sha256_bytes(f"{label}@{dataset._fingerprint}".encode())

    def values(seen: Seen) -> Values:
        for number, row in enumerate(rows, 1):
            yield number, _without_nulls(row)
            seen(number / len(rows))

    return Source(label, sha256, "record", values)


JSON_LINES = (".jsonl", ".ndjson", ".jsonlines", ".jl")
SEPARATORS = {".csv": ",;\t", ".tsv": "\t"}
"""What may stand between the fields of a table that is text, by how its name ends."""
READERS: dict[str, Callable[[Path, str], Source]] = {
    **dict.fromkeys(JSON_LINES, _open_json_lines),
    ".json": _open_json,
    ".parquet": _each("record", parquet_rows),
    **{
        suffix: _each("line", functools.partial(csv_rows, separators=separators, knows=is_of_a_shape))
        for suffix, separators in SEPARATORS.items()
    },
    ".txt": _each("line", _documents),
}
"""What reads a file, by how its name ends."""


def _without_nulls(value: Any) -> Any:
    """A row of a table has every column, and what is in it every field that any row has: a null is an absent key."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
