"""Files of strict YAML, read into types: every error names the file, the line and the column.

What the text may be, :mod:`stackctl.storage.yaml_text` says.
"""

from __future__ import annotations

import functools
import itertools
import operator
import re
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from stackctl import __version__
from stackctl.core.errors import StackctlError, Usage, did_you_mean, joined
from stackctl.core.library_messages import reword_message, type_at
from stackctl.core.migrations import migrate
from stackctl.storage.files import read_bounded
from stackctl.storage.paths import missing_path

if TYPE_CHECKING:
    from stackctl.storage.yaml_text import Document, KeyPath

T = TypeVar("T")
_MOST = 10
"""Problems of one file that are named."""


def read_yaml(path: Path, type_: type[T], *, schema: int | None = None) -> T:
    """Read a strict YAML file into a msgspec type.

    Raises:
        NotFound: there is no such file.
        Usage: it is not strict YAML, does not fit the type, or is of another schema.
    """
    return convert(read_document(path), type_, schema=schema)


def read_document(path: Path) -> Document:
    """A strict YAML file, whatever is in it.

    Raises:
        NotFound: there is no such file.
        Usage: it is not strict YAML.
    """
    from stackctl.storage.yaml_text import parse_yaml  # only completing names reads no file, and is to be quick

    return parse_yaml(read_text(path), str(path))


def read_text(path: Path) -> str:
    """A UTF-8 text file of reasonable size, with or without byte-order mark, with any line ends."""
    try:
        return read_bounded(path).decode("utf-8-sig").replace("\r\n", "\n")
    except FileNotFoundError:
        raise missing_path(path) from None
    except IsADirectoryError:
        raise Usage(f"{path} is a folder, not a file") from None
    except UnicodeDecodeError as error:
        raise Usage(f"{path} is not UTF-8 text (byte {error.start})", hint="save it as UTF-8") from None


def convert(document: Document, type_: type[T], *, schema: int | None = None) -> T:
    """Fit a parsed document to a msgspec type; errors name the place and the nearest known key.

    Raises:
        Usage: it does not fit; the first ten places where it does not are named.
    """
    value = document.value
    if not isinstance(value, dict):
        raise Usage(f"{document.source}: expected a mapping of keys to values", hint="write key: value lines")
    if schema is not None:
        value = migrate(value, type_, schema)
        _check_schema(value, schema, document)
    try:
        return msgspec.convert(value, type_, strict=True)
    except msgspec.ValidationError as error:
        raise joined(_explain_all(error, value, type_, document)) from None


def _explain_all(error: msgspec.ValidationError, value: Any, type_: Any, document: Document) -> list[StackctlError]:
    """Everything that does not fit. msgspec names one thing at a time, so each is left out to see the next."""
    problems: list[StackctlError] = []
    left_out: set[KeyPath] = set()
    while len(problems) < _MOST:
        problem, place = _explain(error, value, type_, (), document)
        lacks = re.search(r"missing required field `(.+)`", str(error))
        if not (lacks and (*place, lacks[1]) in left_out):
            problems.append(problem)
        place = tuple(itertools.takewhile(lambda part: isinstance(part, str), place))  # a list goes as a whole
        if not place or place in left_out:
            break  # nothing is left to look at
        left_out.add(place)
        value = _without(value, place)
        try:
            msgspec.convert(value, type_, strict=True)
        except msgspec.ValidationError as another:
            error = another
        else:
            break
    return problems


def _without(value: Any, place: KeyPath) -> Any:
    """A document without what stands at a place in it."""
    if not isinstance(value, dict):
        return value
    first, *rest = place
    return {k: _without(v, tuple(rest)) if k == first else v for k, v in value.items() if k != first or rest}


def _check_schema(value: dict[str, Any], schema: int, document: Document) -> None:
    found = value.get("schema")
    if found == schema and not isinstance(found, bool):
        return
    source = document.where(("schema",))
    if isinstance(found, int) and found > schema:
        raise Usage(
            f"{source}: schema {found} is newer than stackctl {__version__}, which reads schema {schema} at most",
            hint="it was written by a later stackctl; upgrade: pip install --upgrade stackctl-lora",
        )
    raise Usage(f"{source}: schema {found!r} is not known, expected {schema}", hint=f"write schema: {schema}")


def _explain(
    error: msgspec.ValidationError, value: Any, type_: Any, prefix: KeyPath, document: Document
) -> tuple[Usage, KeyPath]:
    """What an error of msgspec's says, and the place that it means; ``value`` stands at ``prefix`` of the document."""
    message, _, location = str(error).partition(" - at ")
    before, in_mapping, _ = location.partition("[...]")
    path = _parse_location(before)
    if in_mapping:  # msgspec does not say under which key, so look for it
        item_type = type_at(type_, (*path, ""))
        for key, item in functools.reduce(operator.getitem, path, value).items():
            try:
                msgspec.convert(item, item_type, strict=True)
            except msgspec.ValidationError as inner:
                return _explain(inner, item, item_type, (*prefix, *path, key), document)
    unknown = re.search(r"unknown field `(.+)`", message)
    full = (*prefix, *path, unknown[1]) if unknown else (*prefix, *path)
    where = document.where(full)
    if unknown:
        known = _known_fields(type_at(type_, path))
        hint = did_you_mean(unknown[1], known, f"known: {', '.join(known)}")
        return Usage(f"{where}: unknown key '{unknown[1]}'", hint=hint), full
    dotted = ".".join(str(part) for part in full)
    said = f"{where}: {dotted + ': ' if dotted else ''}{reword_message(message, type_at(type_, path))}"
    return Usage(said, hint="correct that value"), full


def _parse_location(location: str) -> KeyPath:
    """``$.versions[0].lora`` to ``("versions", 0, "lora")``."""
    found = re.findall(r"\.([^.\[\]`]+)|\[(\d+)\]", location)
    return tuple(int(index) if index else name for name, index in found)


def _known_fields(type_: Any) -> list[str]:
    """The keys that a type knows, for "did you mean"."""
    for candidate in (type_, *typing.get_args(type_)):
        if isinstance(candidate, type) and issubclass(candidate, msgspec.Struct):
            return [field.encode_name for field in msgspec.structs.fields(candidate)]
    return []
