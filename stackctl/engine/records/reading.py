"""Records from files and from the Hub, checked before anything is computed.

What is wrong with a file is said at once and by line, so that one run of the command is enough to repair it. Nothing
is repaired silently: a record that is dropped or guessed at changes what the model learns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from stackctl import files
from stackctl.engine.records.kinds import BadRecord, Format, Record, RecordSet
from stackctl.engine.records.shapes import COLUMNS, PARSERS, SHAPE_HINT, checked_shape, shape_of
from stackctl.engine.records.strict_json import parse_json, parse_lines
from stackctl.errors import HubFailure, NotFound, Usage

_KINDS_HINT = "give JSON Lines (.jsonl), JSON (.json), Parquet (.parquet), text (.txt) or a Hub data set (org/name)"
_NO_HUB_ID = re.compile(
    r".*\.(jsonl|json|parquet|txt|csv|tsv|jsonlines|ndjson|arrow|gz|zst|bz2|xz|zip|yaml|yml|md|xlsx)", re.IGNORECASE
)
"""What ends like this is a file that is missing, not a Hub data set, though ``data/chat.jsonl`` could be both."""
_HUB_ID = re.compile(r"(?P<name>[\w-][\w.-]*/[\w.-]+)(:(?P<split>[\w.\[\]:%-]+))?", re.ASCII)
_SHOWN = 5


def read_records(source: str | Path) -> RecordSet:
    """All records of a file or of a Hub data set: ``org/name``, which is ``org/name:train``, or another split.

    A ``.txt`` file holds documents separated by blank lines: a record per line would cut prose into sentences, and one
    record per file could not be shuffled. Text whose paragraphs belong together is better given as ``{"text"}``.

    Raises:
        NotFound: there is no such file or data set.
        Usage: the wrong kind of file, no records, or bad ones (the first five are named, with their lines).
        HubFailure: the Hub could not be asked.
    """
    name, path = str(source), Path(source)
    if not path.exists():
        if (hub := _HUB_ID.fullmatch(name)) and not _NO_HUB_ID.fullmatch(name):
            return _read_hub(hub["name"], hub["split"])
        raise NotFound(
            f"the data file {name} does not exist", hint="check the path; it may be relative to the working directory"
        )
    readers: dict[str, Callable[[Path, str], RecordSet]] = {
        ".jsonl": _read_json_lines,
        ".json": _read_json,
        ".parquet": _read_parquet,
        ".txt": _read_text,
    }
    if not path.is_file():
        raise Usage(f"{name} is {'a folder' if path.is_dir() else 'not a file'}, not a data file", hint=_KINDS_HINT)
    if (suffix := path.suffix.lower()) not in readers:
        raise Usage(f"{name} is no kind of data file that is read ({suffix or 'it has no suffix'})", hint=_KINDS_HINT)
    return readers[suffix](path, name)


def _read_json_lines(path: Path, name: str) -> RecordSet:
    data, sha256 = utf8(path, name)
    return _record_set(parse_lines(data), name, sha256, "line")


def _read_json(path: Path, name: str) -> RecordSet:
    """A list of records, or JSON Lines under another suffix."""
    data, sha256 = utf8(path, name)
    start = data.lstrip()[:1]
    if start not in (b"[", b"{"):
        if not start:
            raise Usage(f"{name} is empty", hint=SHAPE_HINT)
        raise Usage(f"{name} is neither a JSON list of records nor JSON Lines", hint=SHAPE_HINT)
    try:
        value = parse_json(data)
    except BadRecord as error:
        if start == b"{":
            return _record_set(parse_lines(data), name, sha256, "line")
        where = f", line {error.line}" if error.line else ""
        where += f", column {error.column}" if error.column else ""
        raise Usage(f"{name}{where}: {error}", hint="repair the JSON, or give one record per line") from None
    if isinstance(value, dict):
        if shape_of(value) is None:
            raise Usage(f"{name} is one JSON object, not a list of records", hint=SHAPE_HINT)
        value = [value]
    return _record_set(enumerate(value, 1), name, sha256, "record")


def _read_parquet(path: Path, name: str) -> RecordSet:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    with path.open("rb") as stream:
        try:
            file = pq.ParquetFile(stream)
            known = [column for column in file.schema_arrow.names if column in COLUMNS]
            rows = file.read(columns=known or None).to_pylist()
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise Usage(f"{name} is not a Parquet file that can be read ({reason})", hint=_KINDS_HINT) from None
    return _record_set(enumerate(map(_without_nulls, rows), 1), name, files.sha256_file(path), "record")


def _read_text(path: Path, name: str) -> RecordSet:
    data, sha256 = utf8(path, name)
    documents: list[tuple[int, dict[str, str]]] = []
    lines: list[str] = []
    for number, line in enumerate([*data.decode().replace("\r\n", "\n").split("\n"), ""], 1):
        if line.strip():
            lines.append(line)
        elif lines:
            documents.append((number - len(lines), {"text": "\n".join(lines)}))
            lines = []
    return _record_set(documents, name, sha256, "line")


def _read_hub(repo: str, split: str | None) -> RecordSet:
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
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise Usage(
            f"the Hub data set {label} cannot be read ({reason})", hint="name a split: org/name:split"
        ) from None
    except (OSError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise HubFailure(
            f"the Hub data set {label} could not be fetched ({reason})",
            hint="check the network; if a file was meant, it does not exist",
        ) from error
    known = [column for column in dataset.column_names if column in COLUMNS]
    rows = map(_without_nulls, dataset.select_columns(known) if known else dataset)
    sha256 = files.sha256_bytes(f"{label}@{dataset._fingerprint}".encode())
    return _record_set(enumerate(rows, 1), label, sha256, "record")


def utf8(path: Path, name: str) -> tuple[bytes, str]:
    """A file's bytes without a byte-order mark, known to be UTF-8, and the digest of the bytes as they are."""
    raw = path.read_bytes()
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise Usage(f"{name} is UTF-16, not UTF-8 (byte 0x{raw[0]:02x} on line 1)", hint="save it as UTF-8")
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        where = f"byte 0x{raw[error.start]:02x} on line {line}"
        raise Usage(f"{name} is not UTF-8 ({where})", hint="save it as UTF-8") from None
    return raw.removeprefix(b"\xef\xbb\xbf"), files.sha256_bytes(raw)


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a table has every column: a null is an absent key."""
    return {key: value for key, value in row.items() if value is not None}


def _record_set(
    values: Iterable[tuple[int, Any]], name: str, sha256: str, unit: Literal["line", "record"]
) -> RecordSet:
    """Check and normalise every record.

    Raises:
        Usage: there are none, or some are bad.
    """
    records: list[Record] = []
    problems: list[str] = []
    first: tuple[Format, int] | None = None
    for number, value in values:
        try:
            if isinstance(value, BadRecord):
                raise value
            shape = checked_shape(value)
            first = first or (shape, number)
            if shape != first[0]:
                raise BadRecord(f"has the shape of '{shape}', but {unit} {first[1]} that of '{first[0]}'")
            records.append(PARSERS[shape](number, value))
        except BadRecord as error:
            column = f", column {error.column}" if error.column else ""
            problems.append(f"{unit} {number}{column}: {error}")
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise Usage(f"{name}: {'; '.join(problems[:_SHOWN])}{more}", hint=SHAPE_HINT)
    if not records or not first:
        raise Usage(f"{name} holds no records", hint=SHAPE_HINT)
    return RecordSet(records, first[0], name, sha256, len(records), unit)
