"""The five shapes in which records are written: recognised, checked, and turned into one of the three kinds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stackctl.core.errors import did_you_mean
from stackctl.engine.records.types import (
    BadRecord,
    ChatRecord,
    CompletionRecord,
    Format,
    Message,
    Record,
    TextRecord,
)

_SHAPES: dict[Format, tuple[str, ...]] = {
    # The more specific come first: published Alpaca files carry a "text" as well, UltraChat a "prompt".
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
COLUMNS = {"input", *(key for keys in _SHAPES.values() for key in keys)}
SHAPE_HINT = (
    'a record is {"text"}, {"messages": [{"role", "content"}]}, {"conversations": [{"from", "value"}]}, '
    '{"prompt", "completion"} or {"instruction", "input", "output"}'
)
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


def shape_of(record: dict[str, Any]) -> Format | None:
    """The first shape whose keys all have values; else the first whose keys are all there."""
    for present in ({key for key, value in record.items() if value is not None}, set(record)):
        for shape, keys in _SHAPES.items():
            if present.issuperset(keys):
                return shape
    return None


def checked_shape(record: Any) -> Format:
    if not isinstance(record, dict):
        raise BadRecord(f"{_kind(record)}, not an object")
    if not (shape := shape_of(record)):
        keys = ", ".join(f"'{key}'" for key in list(record)[:6]) or "nothing"
        raise BadRecord(f"of no known shape (it has {keys})")
    return shape


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")


def text_of(value: Any, what: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise BadRecord(f"{what} is {_kind(value)}, not a string")
    if not may_be_empty and not value.strip():
        raise BadRecord(f"{what} is empty")
    return value


def _message(value: Any, position: int) -> Message:
    """One turn, in either spelling: ``role``/``content`` or ``from``/``value``."""
    where = f"message {position}"
    if not isinstance(value, dict):
        raise BadRecord(f"{where} is {_kind(value)}, not an object")
    role_key, content_key = ("from", "value") if "from" in value else ("role", "content")
    role = text_of(value.get(role_key), f"{where}'s '{role_key}'")
    known = tuple(_SHAREGPT) if role_key == "from" else _ROLES
    if role not in known:
        raise BadRecord(f"{where} has the unknown '{role_key}' '{role}': {did_you_mean(role, known, ', '.join(known))}")
    role = _SHAREGPT[role] if role_key == "from" else role
    if lost := [key for key in _LOST if value.get(key)]:
        raise BadRecord(f"{where} has '{lost[0]}', which is not read: write it into its '{content_key}', as text")
    content = text_of(value.get(content_key), f"{where}'s '{content_key}'", may_be_empty=role in _MAY_BE_EMPTY)
    return {"role": role, "content": content}


def messages_of(value: Any, what: str, start: int = 1) -> list[Message]:
    if not isinstance(value, list):
        raise BadRecord(f"{what} is {_kind(value)}, not a list of messages")
    return [_message(item, position) for position, item in enumerate(value, start)]


def _chat(number: int, messages: list[Message], context: int = 0) -> ChatRecord:
    if not any(message["role"] == "assistant" for message in messages[context:]):
        raise BadRecord("has no assistant turn" if not context else "its 'completion' has no assistant turn")
    return ChatRecord(number, messages, context)


def _parse_prompt(number: int, record: dict[str, Any]) -> Record:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        context = messages_of(prompt, "'prompt'")
        return _chat(number, context + messages_of(completion, "'completion'", len(context) + 1), len(context))
    return CompletionRecord(number, text_of(prompt, "'prompt'"), text_of(completion, "'completion'"))


def instruction_text(record: dict[str, Any]) -> str:
    """What Alpaca's shape asks for: the instruction, and the input below it where there is one."""
    instruction = text_of(record["instruction"], "'instruction'")
    given = record.get("input")
    given = "" if given is None else text_of(given, "'input'", may_be_empty=True)
    return f"{instruction}\n\n{given}" if given.strip() else instruction


def _parse_instruction(number: int, record: dict[str, Any]) -> Record:
    """Alpaca's shape, as a conversation of two turns."""
    user, output = instruction_text(record), text_of(record["output"], "'output'")
    return ChatRecord(number, [{"role": "user", "content": user}, {"role": "assistant", "content": output}])


PARSERS: dict[Format, Callable[[int, dict[str, Any]], Record]] = {
    "text": lambda number, record: TextRecord(number, text_of(record["text"], "'text'")),
    "messages": lambda number, record: _chat(number, messages_of(record["messages"], "'messages'")),
    "conversations": lambda number, record: _chat(number, messages_of(record["conversations"], "'conversations'")),
    "prompt": _parse_prompt,
    "instruction": _parse_instruction,
}
