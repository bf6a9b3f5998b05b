"""A conversation in the words of one chat template: its roles, thoughts and calls as that template shows them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from stackctl.core.template_arguments import check_template_arguments
from stackctl.engine.data.chat_template import SENTINEL, TEMPLATE_ERRORS, ChatTemplate
from stackctl.engine.data.reasoning import ReasonedAnswer, take_apart
from stackctl.engine.records.types import Message

NOTHING = "shows nothing"


@dataclass(frozen=True)
class Conversation:
    """Messages as the template takes them, turn for turn those of the record.

    ``reasoned`` are the assistant's turns taken apart, by position; ``said`` is what could not be shown as it was
    given.
    """

    messages: list[Message]
    reasoned: dict[int, ReasonedAnswer]
    tools: list[Any] | None
    template: dict[str, Any]
    said: tuple[str, ...] = ()

    @property
    def last(self) -> tuple[Message, ReasonedAnswer]:
        """The last turn, which is the assistant's."""
        return self.messages[-1], self.reasoned[len(self.messages) - 1]

    def first(self, count: int) -> Conversation:
        """The same conversation up to a turn."""
        return replace(self, messages=self.messages[:count])

    def ending_in(self, message: Message) -> Conversation:
        """The same conversation with something else as its last turn."""
        return replace(self, messages=[*self.messages[:-1], message])

    def render(self, template: ChatTemplate, *, prompt: bool = False) -> str:
        """As text, with what generation begins behind, or without."""
        return template.render(self.messages, prompt=prompt, tools=self.tools, template=self.template)


def converse(
    template: ChatTemplate, messages: Sequence[Message], tools: list[Any] | None, arguments: dict[str, Any]
) -> Conversation:
    """A conversation as a template takes it.

    Raises:
        ValueError: the template shows nothing of something that is to be learned.
        TEMPLATE_ERRORS: what the template raises.
    """
    check_template_arguments(arguments)
    said: list[str] = []
    if template.wants_call_ids and any("id" not in call for m in messages for call in m.get("tool_calls", [])):
        messages = numbered(messages)
        said.append("wants an id for each call: they are numbered")
    shown: list[Message] = []
    reasoned: dict[int, ReasonedAnswer] = {}
    for position, message in enumerate(messages):
        role, visible = template.role(message["role"])
        if not visible:
            said.append(f"{NOTHING} of turns of the role '{message['role']}'")
        elif role != message["role"]:
            said.append(f"has no role '{message['role']}': '{role}' is used")
        if role != "assistant":
            shown.append({**message, "role": role})
            continue
        reasoned[position] = take_apart(message, template.tags)
        if message.get("tool_calls") and template.arguments_as_text is None:
            raise ValueError(f"it shows nothing of the tool_calls of message {position + 1}")
        shown.append(as_shown(template, message, reasoned[position]))
        if message.get("reasoning_content") and template.thought_key is None:
            said.append("has no place for a thought: it stands in the content, as <think>")
    found = Conversation(shown, reasoned, None, arguments, tuple(dict.fromkeys(said)))
    return replace(found, **_tools(template, found, tools)) if tools else found


def render_prompt(
    template: ChatTemplate, messages: Sequence[Message], tools: list[Any] | None, arguments: dict[str, Any]
) -> str:
    """What generation begins behind: a conversation up to where the assistant is to speak, as in training.

    Raises:
        ValueError: the template shows nothing of something in it.
        TEMPLATE_ERRORS: what the template raises.
    """
    talk = converse(template, messages, tools, arguments)
    if hidden := [said for said in talk.said if said.startswith(NOTHING)]:
        raise ValueError(f"it {', '.join(hidden)}")
    return talk.render(template, prompt=True)


def numbered(messages: Sequence[Message]) -> list[Message]:
    """The same turns with an id for every call, of nine characters, and in the turns of tools that answer them."""
    made: list[Message] = []
    waiting: list[str] = []
    count = 0
    for message in messages:
        if calls := message.get("tool_calls"):
            ids = [call.get("id") or f"call{count + place:05}" for place, call in enumerate(calls, 1)]
            count += len(calls)
            waiting += ids
            calls = [{**call, "id": name} for call, name in zip(calls, ids, strict=True)]
            made.append({**message, "tool_calls": calls})
        elif message["role"] == "tool" and "tool_call_id" not in message and waiting:
            made.append({**message, "tool_call_id": waiting.pop(0)})
        else:
            made.append(message)
    return made


def as_shown(template: ChatTemplate, message: Message, reasoned: ReasonedAnswer, *, thought: bool = True) -> Message:
    """A turn of the assistant as the template takes it, with its thought or without."""
    made: Message = {"role": "assistant", "content": reasoned.answer}
    if thought and reasoned.thought:
        if template.thought_key:
            made[template.thought_key] = reasoned.thought
        else:
            made["content"] = in_block(reasoned)
    if calls := message.get("tool_calls"):
        made["tool_calls"] = [_call(call, as_text=bool(template.arguments_as_text)) for call in calls]
    return made


def in_block(reasoned: ReasonedAnswer, *, opened: str = "") -> str:
    """A thought and the answer behind it as one text; ``opened`` is the end of a prompt that opens the thought."""
    tag = reasoned.tag
    written = reasoned.written or f"\n{reasoned.thought}\n{tag.close}\n\n"
    if not opened:
        return tag.open + written + reasoned.answer
    space = opened[len(opened.rstrip()) :]
    if not reasoned.written and not space:
        return reasoned.thought + tag.close + reasoned.answer
    return written.removeprefix(space) + reasoned.answer


def _call(call: dict[str, Any], *, as_text: bool) -> dict[str, Any]:
    function = call["function"]
    if not as_text or isinstance(function["arguments"], str):
        return call
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def _tools(template: ChatTemplate, found: Conversation, tools: list[Any]) -> dict[str, Any]:
    """Tools as the template shows them, wrapped as OpenAI does if need be; none, and a word, where it shows none."""
    wrapped = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    opening = [m for m in found.messages[:1] if m["role"] in ("system", "developer")] + template.opening[-1:]
    bare = template.render(opening, prompt=True, template=found.template)
    refused: Exception | None = None
    for given in (wrapped, tools, _complete(wrapped)):
        try:
            text = template.render(opening, prompt=True, tools=given, template=found.template)
        except TEMPLATE_ERRORS as error:
            refused = error
            continue
        if all(text.count(_name(tool)) > bare.count(_name(tool)) for tool in tools):
            return {"tools": given}
    if refused:
        raise refused
    return {"said": (*found.said, f"{NOTHING} of 'tools'")}


def _complete(tools: list[Any]) -> list[Any]:
    """Tools with every key that templates may want."""
    return [
        {
            **tool,
            "function": {"description": "", "parameters": {"type": "object", "properties": {}}, **tool["function"]},
        }
        for tool in tools
    ]


def _name(tool: Any) -> str:
    name = (tool.get("function") or tool).get("name") if isinstance(tool.get("function") or tool, dict) else None
    return str(name or SENTINEL)
