"""What libraries say of a wrong value or a wrong line, in the words of everything else that is said here."""

from __future__ import annotations

import re

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
_PHRASES = (
    (r"is not in the range (\S+?)<=x<=(\S+)", r"is not between \1 and \2"),
    (r"is not in the range x>=(\S+)", r"is less than \1"),
    (r"is not a valid int\b(?:eger)?(?: range)?", "is no whole number"),
    (r"is not a valid float\b(?: range)?", "is no number"),
    (r"Got unexpected extra argument\(s\) \((.*)\)", r"there is nothing that '\1' could mean here"),
    (r"Option '(\S+)' requires an argument", r"\1 needs a value"),
)
"""typer's phrases."""


def reword_message(message: str) -> str:
    """A library's message in plain words, beginning in lower case, without a full stop."""
    for theirs, ours in _PHRASES:
        message = re.sub(theirs, ours, message)
    message = re.sub(r"`([a-z |]+)`", lambda found: _kinds(found[1]), message).rstrip(".")
    return message[:1].lower() + message[1:]


def _kinds(types: str) -> str:
    names = [_KINDS.get(name) for name in types.split(" | ")]
    return " or ".join(name for name in names if name) if all(names) else f"`{types}`"
