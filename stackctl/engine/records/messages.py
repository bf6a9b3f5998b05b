"""The turns of a conversation as people write them, made into those that chat templates take."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from stackctl.core.errors import did_you_mean
from stackctl.engine.records.strict_json import parse_json
from stackctl.engine.records.types import BadRecord, Message

_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_SHAREGPT = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "function", "observation", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
}
_CALLS = ("function_call", "tool_call")
"""Turns of ShareGPT's shape that are a call, written as JSON."""
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""What peers call the thought before an answer."""
_FLAGS = ("weight", "train", "training", "loss")
"""What peers call a turn's flag that says whether it is learned."""
_MAY_BE_EMPTY = {"system", "developer", "tool", "function", "ipython"}


@dataclass
class ParsedMessages:
    """Messages, and the positions of those that are said not to be learned."""

    messages: list[Message] = field(default_factory=list)
    muted: set[int] = field(default_factory=set)


def kind_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")


def text_of(value: Any, what: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise BadRecord(f"{what} is {kind_of(value)}, not a string")
    if not may_be_empty and not value.strip():
        raise BadRecord(f"{what} is empty")
    return value


def json_of(value: Any, what: str, *kinds: type) -> Any:
    """A value that may also be given as its JSON text, as tables and some data sets have it."""
    if isinstance(value, str):
        try:
            value = parse_json(value.encode())
        except BadRecord as error:
            why = str(error).removeprefix("not valid JSON: ")
            raise BadRecord(f"{what} is a string that is not JSON: {why}") from None
    if not isinstance(value, kinds):
        raise BadRecord(f"{what} is {kind_of(value)}, not {'a list' if kinds[0] is list else 'an object'}")
    return value


def turns_of(value: Any, what: str, start: int = 1) -> ParsedMessages:
    """Messages in either spelling: ``role``/``content`` or ``from``/``value``; ``start`` numbers the first."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = json_of(value, what, list)
    if not isinstance(value, list):
        raise BadRecord(f"{what} is {kind_of(value)}, not a list of messages")
    turns = ParsedMessages()
    for position, item in enumerate(value):
        message, learned = _message(item, f"message {start + position}")
        turns.messages.append(message)
        if not learned:
            turns.muted.add(position)
    return turns


def _message(value: Any, where: str) -> tuple[Message, bool]:
    """One turn, and whether it may be learned."""
    if not isinstance(value, dict):
        raise BadRecord(f"{where} is {kind_of(value)}, not an object")
    role_key, content_key = ("from", "value") if "from" in value else ("role", "content")
    said = text_of(value.get(role_key), f"{where}'s '{role_key}'")
    known = tuple(_SHAREGPT) if role_key == "from" else _ROLES
    if said not in known:
        raise BadRecord(f"{where} has the unknown '{role_key}' '{said}': {did_you_mean(said, known, ', '.join(known))}")
    role = _SHAREGPT[said] if role_key == "from" else said
    learned = _learned(value, where)
    what = f"{where}'s '{content_key}'"
    message: Message = {"role": role}
    if role == "assistant":
        given = value.get(content_key)
        calls = _calls(value, where)
        if said in _CALLS:
            calls, given = _as_calls(given, what), None
        thought = next((value[key] for key in _THOUGHTS if value.get(key)), None)
        speaks = not calls and thought is None and learned
        message["content"] = "" if given is None and not speaks else _content(given, what, may_be_empty=not speaks)
        if thought is not None:
            message["reasoning_content"] = text_of(thought, f"{where}'s thought")
        if calls:
            message["tool_calls"] = calls
        return message, learned
    given = value.get(content_key)
    if role in ("tool", "function", "ipython"):
        is_parts = isinstance(given, list) and all(isinstance(part, dict) and "type" in part for part in given)
        if given is not None and not isinstance(given, str) and not is_parts:
            given = json.dumps(given, ensure_ascii=False)
        message |= {key: value[key] for key in ("name", "tool_call_id") if isinstance(value.get(key), str)}
    message["content"] = _content(given, what, may_be_empty=role in _MAY_BE_EMPTY)
    return {"role": role, "content": message.pop("content"), **message}, learned


def _learned(value: dict[str, Any], where: str) -> bool:
    for key in _FLAGS:
        flag = value.get(key)
        if flag is None:
            continue
        if not isinstance(flag, bool | int | float) or flag not in (0, 1):
            raise BadRecord(f"{where}'s '{key}' is {json.dumps(flag)}: a turn is learned (1, true) or not (0, false)")
        if not flag:
            return False
    return True


def _content(value: Any, what: str, *, may_be_empty: bool) -> str:
    """A content as one text; parts of text are joined as they stand."""
    if isinstance(value, list) and value and all(isinstance(part, dict | str) for part in value):
        texts = []
        for number, part in enumerate(value, 1):
            kind = part.get("type", "text") if isinstance(part, dict) else "text"
            if kind not in ("text", "input_text", "output_text"):
                raise BadRecord(f"{what} has a part of the type '{kind}' (part {number}), and only text is learned")
            part_text = part.get("text") if isinstance(part, dict) else part
            texts.append(text_of(part_text, f"part {number} of {what}", may_be_empty=True))
        value = "".join(texts)
    return text_of(value, what, may_be_empty=may_be_empty)


def _calls(value: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """What a turn calls: ``tool_calls`` as OpenAI writes them, or its older ``function_call``."""
    given = value.get("tool_calls")
    if not given and isinstance(value.get("function_call"), dict):
        given = [value["function_call"]]
    return _as_calls(given, f"{where}'s 'tool_calls'") if given else []


def _as_calls(given: Any, what: str) -> list[dict[str, Any]]:
    if isinstance(given, str):
        given = json_of(given, what, list, dict)
    calls = []
    for call in given if isinstance(given, list) else [given]:
        if not isinstance(call, dict):
            raise BadRecord(f"{what} has {kind_of(call)} in it, not an object")
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRecord(f"{what} has a call without a 'name'")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = json_of(arguments, f"the arguments in {what}", dict) if arguments.strip() else {}
        elif arguments is None:
            arguments = {}
        elif not isinstance(arguments, dict):
            raise BadRecord(f"the arguments in {what} are {kind_of(arguments)}, not an object")
        made = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        calls.append({**({"id": call["id"]} if isinstance(call.get("id"), str) else {}), **made})
    return calls


def tools_of(record: dict[str, Any]) -> list[Any] | None:
    """The tools of a record: a list or its JSON text under ``tools``, or OpenAI's older ``functions``."""
    if record.get("tools"):
        tools = json_of(record["tools"], "'tools'", list)
    elif record.get("functions"):
        tools = [{"type": "function", "function": f} for f in json_of(record["functions"], "'functions'", list)]
    else:
        return None
    if not all(isinstance(tool, dict) for tool in tools):
        raise BadRecord("'tools' has something in it that is not an object")
    return tools or None


def template_arguments(record: dict[str, Any]) -> dict[str, Any]:
    """What a record gives to the chat template: ``chat_template_kwargs``, and ``enable_thinking`` beside it."""
    given = record.get("chat_template_kwargs")
    found = {} if given is None else dict(json_of(given, "'chat_template_kwargs'", dict))
    if record.get("enable_thinking") is not None:
        if not isinstance(record["enable_thinking"], bool):
            raise BadRecord(f"'enable_thinking' is {kind_of(record['enable_thinking'])}, not true or false")
        found["enable_thinking"] = record["enable_thinking"]
    return found
