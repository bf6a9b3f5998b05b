"""Records from files and from the Hub, in one of five shapes, checked before anything is computed.

What is wrong with a file is said at once and by line, so that one run of the command is enough to repair it. Nothing
is repaired silently: a record that is dropped or guessed at changes what the model learns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import msgspec

from stackctl import files
from stackctl.errors import HubFailure, NotFound, Usage, did_you_mean

Format = Literal["text", "messages", "conversations", "prompt", "instruction"]
Message = dict[str, str]
"""``{"role": …, "content": …}``, as chat templates take it."""


@dataclass(frozen=True, slots=True)
class TextRecord:
    """A document to model. ``number`` is its line or its place in the file, from 1."""

    number: int
    text: str


@dataclass(frozen=True, slots=True)
class CompletionRecord:
    """What to complete, and how."""

    number: int
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class ChatRecord:
    """A conversation. Of the first ``context`` messages none is to be learned, even when the assistant speaks."""

    number: int
    messages: list[Message]
    context: int = 0


Record = TextRecord | CompletionRecord | ChatRecord


@dataclass(frozen=True)
class RecordSet:
    """The records of one source, all of one shape.

    ``sha256`` is that of the file's bytes, or of a Hub data set's fingerprint. ``unit`` is what a record's number
    counts: lines, or records where a file has no lines to speak of (JSON lists, Parquet, the Hub).
    """

    records: list[Record]
    format: Format
    path: str
    sha256: str
    count: int
    unit: Literal["line", "record"] = "line"

    def place(self, number: int) -> str:
        """``line 3``: where a record stands, for messages."""
        return f"{self.unit} {number}"


_SHAPES: dict[Format, tuple[str, ...]] = {
    # The more specific come first: published Alpaca files carry a "text" as well, UltraChat a "prompt".
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
_COLUMNS = {"input", *(key for keys in _SHAPES.values() for key in keys)}
_SHAPE_HINT = (
    'a record is {"text"}, {"messages": [{"role", "content"}]}, {"conversations": [{"from", "value"}]}, '
    '{"prompt", "completion"} or {"instruction", "input", "output"}'
)
_KINDS_HINT = "give JSON Lines (.jsonl), JSON (.json), Parquet (.parquet), text (.txt) or a Hub data set (org/name)"
_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_SHAREGPT = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}
_LOST = ("tool_calls", "function_call", "reasoning_content", "thinking")
"""Keys of a message that some templates write into the assistant's turn; without them it would be another turn."""
_MAY_BE_EMPTY = {"system", "developer", "tool", "function", "ipython"}
_NO_HUB_ID = re.compile(
    r".*\.(jsonl|json|parquet|txt|csv|tsv|jsonlines|ndjson|arrow|gz|zst|bz2|xz|zip|yaml|yml|md|xlsx)", re.IGNORECASE
)
"""What ends like this is a file that is missing, not a Hub data set, though ``data/chat.jsonl`` could be both."""
_HUB_ID = re.compile(r"(?P<name>[\w-][\w.-]*/[\w.-]+)(:(?P<split>[\w.\[\]:%-]+))?", re.ASCII)
_SHOWN = 5


class _Bad(Exception):
    """What is wrong with one record, without its place. ``column`` is known for broken JSON."""

    def __init__(self, message: str, *, line: int | None = None, column: int | None = None) -> None:
        super().__init__(message)
        self.line, self.column = line, column


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
    data, sha256 = _utf8(path, name)
    return _record_set(_parse_lines(data), name, sha256, "line")


def _read_json(path: Path, name: str) -> RecordSet:
    """A list of records, or JSON Lines under another suffix."""
    data, sha256 = _utf8(path, name)
    start = data.lstrip()[:1]
    if start not in (b"[", b"{"):
        if not start:
            raise Usage(f"{name} is empty", hint=_SHAPE_HINT)
        raise Usage(f"{name} is neither a JSON list of records nor JSON Lines", hint=_SHAPE_HINT)
    try:
        value = _parse_json(data)
    except _Bad as error:
        if start == b"{":
            return _record_set(_parse_lines(data), name, sha256, "line")
        where = f", line {error.line}" if error.line else ""
        where += f", column {error.column}" if error.column else ""
        raise Usage(f"{name}{where}: {error}", hint="repair the JSON, or give one record per line") from None
    if isinstance(value, dict):
        if _shape_of(value) is None:
            raise Usage(f"{name} is one JSON object, not a list of records", hint=_SHAPE_HINT)
        value = [value]
    return _record_set(enumerate(value, 1), name, sha256, "record")


def _read_parquet(path: Path, name: str) -> RecordSet:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    with path.open("rb") as stream:
        try:
            file = pq.ParquetFile(stream)
            known = [column for column in file.schema_arrow.names if column in _COLUMNS]
            rows = file.read(columns=known or None).to_pylist()
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise Usage(f"{name} is not a Parquet file that can be read ({reason})", hint=_KINDS_HINT) from None
    return _record_set(enumerate(map(_without_nulls, rows), 1), name, files.sha256_file(path), "record")


def _read_text(path: Path, name: str) -> RecordSet:
    data, sha256 = _utf8(path, name)
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
    known = [column for column in dataset.column_names if column in _COLUMNS]
    rows = map(_without_nulls, dataset.select_columns(known) if known else dataset)
    sha256 = files.sha256_bytes(f"{label}@{dataset._fingerprint}".encode())
    return _record_set(enumerate(rows, 1), label, sha256, "record")


def _utf8(path: Path, name: str) -> tuple[bytes, str]:
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


def _parse_lines(data: bytes) -> Iterator[tuple[int, Any]]:
    """Each line's value, or what is wrong with it. Lines end with a newline only: U+2028 may stand in a string."""
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            try:
                yield number, _parse_json(line)
            except _Bad as error:
                yield number, error


def _parse_json(data: bytes) -> Any:
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
        raise _Bad(f"not valid JSON: {standard.msg}", line=standard.lineno, column=standard.colno) from None
    except RecursionError:
        message = "nested too deeply"
    except ValueError as standard:
        message = str(standard)
    if position := re.search(r" \(byte (\d+)\)", str(error)):
        before = data[: int(position[1])]
        line, column = before.count(b"\n") + 1, len(before.rpartition(b"\n")[2].decode(errors="ignore")) + 1
    raise _Bad(f"not valid JSON: {message}", line=line, column=column)


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
            if isinstance(value, _Bad):
                raise value
            shape = _checked_shape(value)
            first = first or (shape, number)
            if shape != first[0]:
                raise _Bad(f"has the shape of '{shape}', but {unit} {first[1]} that of '{first[0]}'")
            records.append(_PARSERS[shape](number, value))
        except _Bad as error:
            column = f", column {error.column}" if error.column else ""
            problems.append(f"{unit} {number}{column}: {error}")
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise Usage(f"{name}: {'; '.join(problems[:_SHOWN])}{more}", hint=_SHAPE_HINT)
    if not records or not first:
        raise Usage(f"{name} holds no records", hint=_SHAPE_HINT)
    return RecordSet(records, first[0], name, sha256, len(records), unit)


def _shape_of(record: dict[str, Any]) -> Format | None:
    """The first shape whose keys all have values; else the first whose keys are all there."""
    for present in ({key for key, value in record.items() if value is not None}, set(record)):
        for shape, keys in _SHAPES.items():
            if present.issuperset(keys):
                return shape
    return None


def _checked_shape(record: Any) -> Format:
    if not isinstance(record, dict):
        raise _Bad(f"{_kind(record)}, not an object")
    if not (shape := _shape_of(record)):
        keys = ", ".join(f"'{key}'" for key in list(record)[:6]) or "nothing"
        raise _Bad(f"of no known shape (it has {keys})")
    return shape


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")


def _text_of(value: Any, what: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise _Bad(f"{what} is {_kind(value)}, not a string")
    if not may_be_empty and not value.strip():
        raise _Bad(f"{what} is empty")
    return value


def _message(value: Any, position: int) -> Message:
    """One turn, in either spelling: ``role``/``content`` or ``from``/``value``."""
    where = f"message {position}"
    if not isinstance(value, dict):
        raise _Bad(f"{where} is {_kind(value)}, not an object")
    role_key, content_key = ("from", "value") if "from" in value else ("role", "content")
    role = _text_of(value.get(role_key), f"{where}'s '{role_key}'")
    known = tuple(_SHAREGPT) if role_key == "from" else _ROLES
    if role not in known:
        raise _Bad(f"{where} has the unknown '{role_key}' '{role}': {did_you_mean(role, known, ', '.join(known))}")
    role = _SHAREGPT[role] if role_key == "from" else role
    if lost := [key for key in _LOST if value.get(key)]:
        raise _Bad(f"{where} has '{lost[0]}', which is not read: write it into its '{content_key}', as text")
    content = _text_of(value.get(content_key), f"{where}'s '{content_key}'", may_be_empty=role in _MAY_BE_EMPTY)
    return {"role": role, "content": content}


def _messages(value: Any, what: str, start: int = 1) -> list[Message]:
    if not isinstance(value, list):
        raise _Bad(f"{what} is {_kind(value)}, not a list of messages")
    return [_message(item, position) for position, item in enumerate(value, start)]


def _chat(number: int, messages: list[Message], context: int = 0) -> ChatRecord:
    if not any(message["role"] == "assistant" for message in messages[context:]):
        raise _Bad("has no assistant turn" if not context else "its 'completion' has no assistant turn")
    return ChatRecord(number, messages, context)


def _parse_prompt(number: int, record: dict[str, Any]) -> Record:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        context = _messages(prompt, "'prompt'")
        return _chat(number, context + _messages(completion, "'completion'", len(context) + 1), len(context))
    return CompletionRecord(number, _text_of(prompt, "'prompt'"), _text_of(completion, "'completion'"))


def _parse_instruction(number: int, record: dict[str, Any]) -> Record:
    """Alpaca's shape, as a conversation of two turns."""
    instruction, output = _text_of(record["instruction"], "'instruction'"), _text_of(record["output"], "'output'")
    given = record.get("input")
    given = "" if given is None else _text_of(given, "'input'", may_be_empty=True)
    user = f"{instruction}\n\n{given}" if given.strip() else instruction
    return ChatRecord(number, [{"role": "user", "content": user}, {"role": "assistant", "content": output}])


_PARSERS: dict[Format, Callable[[int, dict[str, Any]], Record]] = {
    "text": lambda number, record: TextRecord(number, _text_of(record["text"], "'text'")),
    "messages": lambda number, record: _chat(number, _messages(record["messages"], "'messages'")),
    "conversations": lambda number, record: _chat(number, _messages(record["conversations"], "'conversations'")),
    "prompt": _parse_prompt,
    "instruction": _parse_instruction,
}
