"""What is said in a turn: whether a text holds all of it, and where in a text it begins and ends."""

from __future__ import annotations

import json
import re
from typing import Any

from stackctl.engine.data.chat_template import SENTINEL
from stackctl.engine.data.reasoning import ReasonedAnswer, tag_of
from stackctl.engine.records.types import Message


def whole_tags(text: str, at: int) -> int:
    """A place in a text, moved back to the beginning of the tag that it lies in."""
    opened = max(text.rfind("<", 0, at), text.rfind("[", 0, at))
    if opened < 0:
        return at
    return opened if re.search(r"[>\]\s]", text[opened:at]) is None else at


def saying_otherwise(message: Message) -> Message:
    """The same turn, saying other things."""

    def other(value: Any) -> Any:
        if isinstance(value, str):
            return f"{SENTINEL}\N{MIDDLE DOT}" if value else value
        if isinstance(value, dict):
            return {key: other(item) for key, item in value.items()}
        return value

    calls = [
        {**call, "function": {**call["function"], "name": SENTINEL, "arguments": _other_arguments(call)}}
        for call in message.get("tool_calls", [])
    ]
    kept = {key: other(value) for key, value in message.items() if key not in ("role", "tool_calls")}
    return {"role": message["role"], **kept, **({"tool_calls": calls} if calls else {})}


def _other_arguments(call: dict[str, Any]) -> Any:
    given = call["function"]["arguments"]
    made = {f"\N{MIDDLE DOT}{SENTINEL}": f"{SENTINEL}\N{MIDDLE DOT}"}
    return json.dumps(made) if isinstance(given, str) else made


def missing(prompt: str, written: str, message: Message, reasoned: ReasonedAnswer) -> list[str]:
    """What of a turn does not stand in what is to be written, or stands there twice."""
    thought, answer = reasoned.thought.strip(), reasoned.answer.strip()
    lost = []
    rest = written
    if (tag := tag_of(prompt)) is not None:
        before, closed, rest = written.partition(tag.close)
        if not closed or before.strip() != thought:
            lost.append("the thought")
    elif thought:
        before, found, rest = written.partition(thought)
        if not found or before.count(reasoned.tag.open) > 1 or reasoned.tag.close in before:
            lost.append("the thought")
            rest = written
    if answer and answer not in rest:
        lost.append("the content")
    bare = rest.replace(answer, "", 1) if answer else rest
    if not all(_shows_call(bare, call) for call in message.get("tool_calls", [])):
        lost.append("the calls")
    return lost


def _shows_call(text: str, call: dict[str, Any]) -> bool:
    arguments = call["function"]["arguments"]
    values = json.loads(arguments) if isinstance(arguments, str) else arguments
    return call["function"]["name"] in text and all(leaf in text for leaf in _leaves(values))


def _leaves(value: Any) -> list[str]:
    """The texts and numbers in an argument, as any template writes them."""
    if isinstance(value, dict | list):
        items = value.values() if isinstance(value, dict) else value
        return [leaf for item in items for leaf in _leaves(item)]
    if isinstance(value, bool) or value is None:
        return []
    return [json.dumps(value, ensure_ascii=False).strip('"').split("\\")[0]]
