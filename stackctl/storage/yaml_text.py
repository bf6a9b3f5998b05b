"""Strict YAML as text: what people mean, and nothing that surprises them.

The core schema of YAML 1.2: ``on`` and ``no`` are words, ``1e-5`` is a number. Duplicate keys, tags, anchors,
several documents and NUL are refused. Every error names the file, the line and the column.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from stackctl.core.errors import MergeConflict, Usage
from stackctl.core.expressions import NUMBER

_MAX_DEPTH = 50
MOST_VALUES = 1_000_000
"""Each takes some 500 bytes of memory and two of a file."""

_CONFLICT = re.compile(r"^(?:<{7} |={7}$|>{7} )", re.MULTILINE)
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufffe\uffff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_NULL = re.compile(r"|~|null|Null|NULL")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(NUMBER)
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_FIRST = frozenset("+-.0123456789~nNtTfF")
"""What begins a plain scalar that may be anything but text."""
_MAX_DIGITS = 640  # what Python converts whatever its limit (sys.set_int_max_str_digits) is

_TAGS = "tag:yaml.org,2002:"

KeyPath = tuple[str | int, ...]
Marks = Mapping[KeyPath, tuple[int, int]]
"""The (line, column), counted from 1, of every value by its path; of a mapping or a sequence under a key, the key's."""
_END = (yaml.SequenceEndEvent, yaml.MappingEndEvent)


@dataclass(frozen=True)
class Document:
    """A parsed text: its value, where everything in that stands, and what the text is called."""

    value: Any
    marks: Marks
    source: str

    def where(self, path: KeyPath) -> str:
        """The place of what stands at a path, or else of what it would stand in, as errors begin."""
        while path and path not in self.marks:
            path = path[:-1]
        line, column = self.marks.get(path, (1, 1))
        return f"{self.source}, line {line}, column {column}"


_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def parse_yaml(text: str, source: str) -> Document:
    """Parse one strict YAML document; ``source`` is what errors call it.

    Values are built from the parser's events: libyaml's own composer recurses without a limit, in C.

    Raises:
        Usage: it is not strict YAML.
    """
    text = text.removeprefix("\ufeff")
    if "\0" in text:
        line = _line(text, "\0")
        raise Usage(f"{source}, line {line}: a NUL character", hint="the file is damaged or not text")
    events = yaml.parse(text, Loader=_Loader)
    try:
        next(events)  # the stream begins
        if isinstance(next(events), yaml.StreamEndEvent):
            return Document(None, _Places(text), source)
        value = _value(events, next(events), 0, itertools.count(1), source)
        next(events)  # the document ends
        if not isinstance(event := next(events), yaml.StreamEndEvent):
            raise _fail(source, event, "a second document begins", "keep one document to a file")
        return Document(value, _Places(text), source)
    except yaml.MarkedYAMLError as error:
        if conflict := _CONFLICT.search(text):
            line = text.count("\n", 0, conflict.start()) + 1
            raise MergeConflict(
                f"{source}, line {line}: an unresolved merge conflict", hint="resolve it in your editor, then try again"
            ) from None
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = error.problem or error.context or "not valid YAML"
        raise Usage(f"{source}{where}: {what}", hint="correct the file at that place") from None
    except (yaml.reader.ReaderError, UnicodeEncodeError):
        found = _UNPRINTABLE.search(text)
        where = f", line {_line(text, found[0])}" if found else ""
        raise Usage(f"{source}{where}: a control character", hint="remove it, or write it as an escape") from None


def _line(text: str, sign: str) -> int:
    return text.count("\n", 0, text.index(sign)) + 1


def _fail(source: str, event: Any, what: str, hint: str) -> Usage:
    return Usage(f"{source}, line {event.start_mark.line + 1}, column {event.start_mark.column + 1}: {what}", hint=hint)


def _value(events: Iterator[Any], event: Any, depth: int, count: Iterator[int], source: str) -> Any:
    """The value that begins with ``event``; ``events`` is left behind its last one."""
    _refuse_indirection(event, source)
    if depth > _MAX_DEPTH:
        raise _fail(source, event, "nested too deep", "make the file flatter")
    if next(count) > MOST_VALUES:
        raise _fail(source, event, f"more than {MOST_VALUES:,} values", "this is another kind of file")
    if isinstance(event, yaml.ScalarEvent):
        return parse_scalar(event.value) if event.implicit[0] else event.value
    if isinstance(event, yaml.SequenceStartEvent):
        items: list[Any] = []
        while not isinstance(item := next(events), yaml.SequenceEndEvent):
            items.append(_value(events, item, depth + 1, count, source))
        return items
    result: dict[str, Any] = {}
    while not isinstance(key := next(events), yaml.MappingEndEvent):
        if isinstance(key, yaml.CollectionStartEvent):
            raise _fail(source, key, "a key must be plain text", "write key: value")
        _refuse_indirection(key, source)
        if key.value in result:
            raise _fail(source, key, f"the key '{key.value}' stands twice", "remove one of them")
        result[key.value] = _value(events, next(events), depth + 1, count, source)
    return result


class _Places(Marks):
    """Where everything in a parsed text stands, found when one is asked for.

    Only an error needs to know, and paths for all values take a third of the time of parsing.
    """

    def __init__(self, text: str) -> None:
        self._text = text

    @functools.cached_property
    def _places(self) -> dict[KeyPath, tuple[int, int]]:
        places: dict[KeyPath, tuple[int, int]] = {}
        events = yaml.parse(self._text, Loader=_Loader)
        next(events)  # the stream begins
        if not isinstance(next(events), yaml.StreamEndEvent):
            _find_places(events, next(events), (), places)
        return places

    def __getitem__(self, path: KeyPath) -> tuple[int, int]:
        return self._places[path]

    def __iter__(self) -> Iterator[KeyPath]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _find_places(events: Iterator[Any], event: Any, path: KeyPath, places: dict[KeyPath, tuple[int, int]]) -> None:
    """The places of the value that begins with ``event``, in a text that has been parsed."""
    places.setdefault(path, _place(event))
    if not isinstance(event, yaml.CollectionStartEvent):
        return
    for number in itertools.count():
        if isinstance(item := next(events), _END):
            return
        part: str | int = number
        if isinstance(event, yaml.MappingStartEvent):
            key, part, item = item, item.value, next(events)
            if isinstance(item, yaml.CollectionStartEvent):
                places[(*path, part)] = _place(key)
        _find_places(events, item, (*path, part), places)


def parse_scalar(text: str) -> Any:
    """A plain (unquoted) scalar as YAML 1.2's core schema reads it; a number too large to be one stays text."""
    if text and text[0] not in _FIRST:
        return text
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text[0] in "tT"
    if _INT.fullmatch(text):
        return int(text) if len(text) <= _MAX_DIGITS else text
    if _FLOAT.fullmatch(text):
        value = float(text)
        return value if math.isfinite(value) else text
    if _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", ""))
    return text


def _refuse_indirection(event: Any, source: str) -> None:
    """Anchors let a few bytes stand for gigabytes, tags name types to build, and nobody needs either here."""
    if event.anchor:  # an alias has one, too
        raise _fail(source, event, "anchors and aliases are not allowed", "write the value out")
    if event.tag:
        raise _fail(source, event, f"the tag {event.tag} is not allowed", "remove the tag")


def _place(event: Any) -> tuple[int, int]:
    return event.start_mark.line + 1, event.start_mark.column + 1


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """Writes in the order given, quotes whatever :func:`parse_scalar` would not read back as text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        return True


class Flow(dict[str, Any]):
    """A mapping that is written on one line."""


def _represent_str(dumper: Any, text: str) -> Any:
    text = _SURROGATE.sub("\ufffd", text)  # a file name that is not Unicode; YAML has no way to write it
    if not isinstance(parse_scalar(text), str):
        return dumper.represent_scalar(f"{_TAGS}str", text, style="'")
    if any(c in text for c in "\x85\u2028\u2029\r"):  # line breaks to YAML, so only escapes keep them
        return dumper.represent_scalar(f"{_TAGS}str", text, style='"')
    return dumper.represent_scalar(f"{_TAGS}str", text, style="|" if "\n" in text else None)


def _plain(dumper: Any, text: str) -> Any:
    return dumper.represent_scalar(f"{_TAGS}str", text)


_Dumper.add_representer(str, _represent_str)
_Dumper.add_representer(bool, lambda d, v: _plain(d, "true" if v else "false"))
_Dumper.add_representer(int, lambda d, v: _plain(d, str(v)))
_Dumper.add_representer(float, lambda d, v: _plain(d, _float_text(v)))
_Dumper.add_representer(type(None), lambda d, _: _plain(d, "null"))
_Dumper.add_representer(Flow, lambda d, v: d.represent_mapping(f"{_TAGS}map", v.items(), flow_style=True))
_Dumper.add_implicit_resolver(f"{_TAGS}str", re.compile(r"(?s).*"), None)


def _float_text(value: float) -> str:
    return repr(value) if math.isfinite(value) else repr(value).replace("inf", ".inf").replace("nan", ".nan")


def format_yaml(value: Any) -> str:
    """A value as strict YAML that :func:`parse_yaml` reads back unchanged."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=10_000)


def format_entry(entry: dict[str, Any]) -> str:
    """The text of an entry's file."""
    return format_yaml(on_one_line(entry))


def on_one_line(value: Any, depth: int = 0) -> Any:
    """Small mappings without mappings inside are written on one line, which people and diffs read best."""
    if isinstance(value, dict):
        inner = {key: on_one_line(item, depth + 1) for key, item in value.items()}
        flat = depth > 1 and inner and not any(isinstance(item, dict) for item in inner.values())
        return Flow(inner) if flat and len(str(inner)) < 400 else inner
    if isinstance(value, list):
        return [on_one_line(item, depth + (0 if isinstance(item, dict) else 1)) for item in value]
    return value
