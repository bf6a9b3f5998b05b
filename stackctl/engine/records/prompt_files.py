"""Prompts from a file: texts, or conversations that wait for an answer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stackctl.core.errors import Usage, listed_problems
from stackctl.engine.records.csv_rows import csv_rows
from stackctl.engine.records.messages import template_arguments, text_of, tools_of, turns_of
from stackctl.engine.records.raw_lines import lines_of, suffix_of
from stackctl.engine.records.shapes import asked_text, before_turns
from stackctl.engine.records.sources import JSON_LINES, SEPARATORS, parquet_rows
from stackctl.engine.records.strict_json import parse_json, parse_lines
from stackctl.engine.records.types import BadRecord, Message, Unit
from stackctl.storage.paths import existing_path

_HINT = 'a record is {"prompt"}, {"messages": [{"role", "content"}]}, {"instruction", "input"} or a string'
_CONVERSATIONS = ("messages", "conversations", "conversation")
_TEXTS = ("prompt", "instruction", "question", "query")


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is asked.

    ``text`` is the prompt as it was given, or the last message of a conversation; ``messages`` the conversation, which
    ends with what is to be answered, or None; ``place`` names it in errors. ``tools`` are what may be called, and
    ``template`` is given to the chat template.
    """

    text: str
    messages: list[Message] | None = None
    place: str = "the prompt"
    tools: list[Any] | None = None
    template: dict[str, Any] = field(default_factory=dict)


def read_prompt_file(path: Path) -> list[Prompt]:
    """Every prompt of a file: the records of a table or of JSON by its suffix, else each line that is not blank.

    A conversation that ends with the assistant, as records of training do, is asked again without that last answer.

    Raises:
        NotFound, Usage: no such file, or some lines hold no prompt (the first five are named).
    """
    if existing_path(path, "the file of prompts").is_dir():
        raise Usage(f"{path} is a folder, not a file of prompts", hint=_HINT)
    if path.is_char_device() or path.is_block_device():  # some never end
        raise Usage(f"{path} is a device, not a file of prompts", hint=_HINT)
    found = _values(path)
    if found is None:
        lines = enumerate((line.decode() for line in lines_of(path, str(path))), 1)
        return [Prompt(line, place=f"{path}, line {number}") for number, line in lines if line.strip()]
    values, unit = found
    prompts, problems = [], []
    for number, value in values:
        try:
            if isinstance(value, BadRecord):
                raise value
            prompts.append(_prompt(value, f"{path}, {unit} {number}"))
        except BadRecord as error:
            problems.append(f"{unit} {number}: {error}")
    if problems:
        raise Usage(f"{path}: {listed_problems(problems)}", hint=_HINT)
    return prompts


def _values(path: Path) -> tuple[Iterable[tuple[int, Any]], Unit] | None:
    """The values of a file, and what each stands in; None of one that is a prompt on each line."""
    suffix = suffix_of(path)
    if suffix == ".parquet":
        return parquet_rows(path, str(path), lambda _: None), "record"
    if suffix in SEPARATORS:
        rows = csv_rows(path, str(path), lambda _: None, separators=SEPARATORS[suffix], knows=_asks)
        return rows, "line"
    if suffix != ".json" and suffix not in JSON_LINES:
        return None
    data = b"\n".join(lines_of(path, str(path)))
    if not data.lstrip().startswith(b"["):
        return parse_lines(data.split(b"\n")), "line"
    try:
        return enumerate(parse_json(data), 1), "record"
    except BadRecord as error:
        raise Usage(
            f"{path}, line {error.line or 1}: {error}", hint="repair the JSON, or give one record per line"
        ) from None


def _asks(header: Iterable[str]) -> bool:
    """Whether a table with these columns has prompts."""
    return not {*_CONVERSATIONS, *_TEXTS}.isdisjoint(header)


def _prompt(value: Any, place: str) -> Prompt:
    if isinstance(value, str):
        return Prompt(text_of(value, "the prompt"), place=place)
    if not isinstance(value, dict):
        raise BadRecord("no prompt")
    for key in (*_CONVERSATIONS, "prompt"):
        given = value.get(key)
        if isinstance(given, list) if key == "prompt" else given is not None:
            return _beside(value, turns_of(given, f"'{key}'").messages, place)
    for key in _TEXTS:
        if value.get(key) is not None:
            asked = Prompt(asked_text(value, key), place=place)
            spoken = _beside(value, [{"role": "user", "content": asked.text}], place)
            return spoken if spoken.tools or spoken.template or len(spoken.messages or ()) > 1 else asked
    raise BadRecord(f"no prompt (it has {', '.join(repr(key) for key in list(value)[:6]) or 'nothing'})")


def _beside(value: dict[str, Any], messages: list[Message], place: str) -> Prompt:
    """A conversation, with the turns, tools and arguments that stand beside it."""
    asked = conversation(before_turns(value, messages) + messages, place)
    return replace(asked, tools=tools_of(value), template=template_arguments(value))


def conversation(messages: list[Message], place: str) -> Prompt:
    """A conversation as a prompt: up to the last turn that is not the assistant's."""
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    if not any(message["role"] not in ("assistant", "system", "developer") for message in messages[:end]):
        raise BadRecord("no message that could be answered")
    return Prompt(messages[end - 1]["content"], messages[:end], place)
