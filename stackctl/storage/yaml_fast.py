"""A quick look at YAML: what stackctl writes itself, read twenty times as fast as by libyaml.

A parser that can say where every value stands makes objects of every sign, which takes a third of a millisecond for one
version of an adapter. Almost every entry is as :func:`stackctl.storage.yaml_text.format_yaml` wrote it, and for that
form a few regular expressions do. Whatever is not of that form, or only might mean something else, is left to the
strict parser: nothing is refused here, and nothing explained.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from stackctl.storage.yaml_scalars import parse_scalar


class _Doubt(Exception):
    """A text that is left to the strict parser."""


_MOST_BREAKS = 500_000
"""Signs that a value begins or ends with; the strict parser knows how many values are too many."""
_TOO_DEEP = "\n" + 20 * " "
_REMEMBERED, _SHORT = 1024, 1000
"""How many pieces are remembered, and how long they are at most: the same lines stand in most entries."""

# No character below means anything to YAML where it is allowed: no comments, tags, anchors, escapes or breaks.
# Possessive quantifiers, for there is only one way to read such a text.
_SIGNS = r"\w./+@~()="
_PLAIN = rf"(?:-(?=[.0-9])|(?=[\w./+~(]))[{_SIGNS}-]*+"
_FLOW_PLAIN = rf"{_PLAIN}(?: [{_SIGNS}-]++)*+"
_QUOTED = rf"'[{_SIGNS}:,;!?#\[\] {{}}-]*+'"
_FLOW_SCALAR = rf"(?:{_FLOW_PLAIN}|{_QUOTED})"
_FLOW_LIST = rf"\[(?:{_FLOW_SCALAR}(?:, {_FLOW_SCALAR})*+)?+\]"
_KEY = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}+"
_BLOCK_KEY = r"[A-Za-z0-9_][A-Za-z0-9_.{},-]{0,99}+"
_PAIR = rf"({_KEY}): ({_FLOW_SCALAR}|{_FLOW_LIST}|\{{\}})"

_is_key = re.compile(_BLOCK_KEY).fullmatch
_is_block_scalar = re.compile(rf"{_PLAIN}(?:[: ]?[{_SIGNS},'-]++)*+").fullmatch
_is_quoted = re.compile(_QUOTED).fullmatch
_is_list = re.compile(_FLOW_LIST).fullmatch
_is_mapping = re.compile(rf"\{{(?:{_PAIR}(?:, {_PAIR})*+)?+\}}").fullmatch
_items = re.compile(_FLOW_SCALAR).findall
_pairs = re.compile(_PAIR).findall
_begins_mapping = re.compile(rf"{_BLOCK_KEY}:(?:[ \n]|\Z)").match
_entries = re.compile(r"\n(?=[^ \n-])").split


def read_quickly(text: str) -> dict[str, Any] | None:
    """The mapping that a YAML document holds, to be looked at and never changed; None where the strict parser has to.

    What is returned is what the strict parser returns for the same text.
    """
    breaks = text.count("\n") + text.count(",") + text.count("[") + text.count("{")
    if breaks > _MOST_BREAKS or _TOO_DEEP in text or not text.endswith("\n"):
        return None
    try:
        return _mapping(text[:-1])
    except _Doubt:
        return None


def _mapping(text: str) -> dict[str, Any]:
    """A block mapping whose keys stand at the beginning of lines."""
    pieces = _entries(text)
    result = dict([_short_entry(piece) if len(piece) <= _SHORT else _entry(piece) for piece in pieces])
    if len(result) < len(pieces):
        raise _Doubt
    return result


def _entry(text: str) -> tuple[str, Any]:
    """A key and its value, on the same line or below."""
    key, colon, rest = text.partition(":")
    if not colon or not _is_key(key):
        raise _Doubt
    if not rest:
        return key, None
    if rest[0] == " ":
        return key, _inline(rest[1:])
    if rest.startswith("\n- "):
        return key, [_item(item) for item in rest[3:].split("\n- ")]
    if rest.startswith("\n  "):
        return key, _mapping(_outdented(rest)[1:])
    raise _Doubt


_short_entry = functools.lru_cache(_REMEMBERED)(_entry)


def _outdented(text: str) -> str:
    """Every line but the first moved two columns to the left."""
    if text.count("\n") != text.count("\n  "):
        raise _Doubt
    return text.replace("\n  ", "\n")


def _item(text: str) -> Any:
    """An item of a block sequence, without its dash."""
    return _mapping(_outdented(text)) if _begins_mapping(text) else _inline(text)


def _inline(text: str) -> Any:
    """A value on one line."""
    if _is_block_scalar(text):
        return parse_scalar(text)
    if _is_quoted(text):
        return text[1:-1]
    if _is_mapping(text):
        pairs = _pairs(text)
        result = {key: _flow(value) for key, value in pairs}
        if len(result) == len(pairs):
            return result
    elif _is_list(text):
        return _list(text)
    raise _Doubt


def _flow(text: str) -> Any:
    """A value inside of a flow mapping or list, known to be one."""
    if text[0] == "'":
        return text[1:-1]
    if text[0] == "[":
        return _list(text)
    return {} if text == "{}" else parse_scalar(text)


def _list(text: str) -> list[Any]:
    return [_flow(item) for item in _items(text[1:-1])]
