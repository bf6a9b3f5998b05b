"""What libraries say of a wrong value or a wrong line, in the words of everything else that is said here."""

from __future__ import annotations

import re
import typing
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "null": "nothing",
    "array": "a list",
    "object": "a mapping",
}
"""msgspec's types."""
_BUILTINS = {int: "int", float: "float", str: "str", bool: "bool"}
_PHRASES = (
    (r"is not in the range (\S+?)<=x<=(\S+)", r"is not between \1 and \2"),
    (r"is not in the range x>=(\S+)", r"is less than \1"),
    (r"is not a valid int\b(?:eger)?(?: range)?", "is not a whole number"),
    (r"is not a valid float\b(?: range)?", "is not a number"),
    (r"Got unexpected extra argument\(s\) \((.*)\)", r"there is nothing that '\1' could mean here"),
    (r"Object missing required field `(.+)`", r"the key '\1' is missing"),
    (r"Option '(\S+)' requires an argument", r"\1 needs a value"),
)
"""typer's and msgspec's phrases."""
_NOT_ONE = re.compile(r"Invalid enum value '(?P<value>.*)'|Expected `[a-z |]+`, got `(?P<kind>[a-z]+)`", re.DOTALL)


def reword_message(message: str, type_: Any = None) -> str:
    """A library's message in plain words, beginning in lower case, without a full stop.

    ``type_`` is what the value had to fit: where only some words do, they are named.
    """
    if (wrong := _NOT_ONE.fullmatch(message)) and (words := _words_of(type_)):
        got = repr(wrong["value"]) if wrong["value"] is not None else _kinds(wrong["kind"])
        return f"expected {', '.join(words[:-1])} or {words[-1]}, got {got}"
    for theirs, ours in _PHRASES:
        message = re.sub(theirs, ours, message)
    message = re.sub(r"`([a-z |]+)`", lambda found: _kinds(found[1]), message).rstrip(".")
    return message[:1].lower() + message[1:]


def _kinds(types: str) -> str:
    names = [_KINDS.get(name) for name in types.split(" | ")]
    return " or ".join(name for name in names if name) if all(names) else f"`{types}`"


def _words_of(type_: Any) -> list[str]:
    """What a type takes that takes some words only: other kinds of value, then the words. Of any other type nothing."""
    words, kinds, parts = list[str](), list[str](), [type_]
    for part in parts:
        if typing.get_origin(part) is Literal:
            words += [repr(word) for word in typing.get_args(part)]
        elif isinstance(part, type) and part in _BUILTINS:
            kinds.append(_KINDS[_BUILTINS[part]])
        else:
            parts += typing.get_args(part)
    return [*kinds, *words] if words else []


def type_at(type_: Any, path: Sequence[str | int]) -> Any:
    """The type that a document of a msgspec type has at a path in it; unions and annotations are looked through."""
    for part in path:
        for candidate in (type_, *typing.get_args(type_)):
            if isinstance(candidate, type) and issubclass(candidate, msgspec.Struct):
                fields = {field.encode_name: field.type for field in msgspec.structs.fields(candidate)}
                type_ = fields.get(str(part), type_)
                break
            if typing.get_origin(candidate) in (dict, list):
                type_ = typing.get_args(candidate)[-1]
                break
    return type_


def explain_option(error: msgspec.ValidationError, type_: Any) -> str:
    """What an error says of an option: ``--rank: expected …``; each option is a field of the type."""
    message, _, place = str(error).partition(" - at `$.")
    name = place.rstrip("`")
    return f"--{name.replace('_', '-')}: {reword_message(message, type_at(type_, [name]))}"
