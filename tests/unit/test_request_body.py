"""Requests to the server: what of OpenAI's API is done, what asks for nothing, and what is refused by its name."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from stackctl.serving import guard
from stackctl.serving.request_body import parse_body
from stackctl.serving.response_body import ApiError

CHAT = {"model": "style", "messages": [{"role": "user", "content": "Hi."}]}
REST_OF_OPENAI = {
    "audio": {"voice": "alloy", "format": "mp3"}, "frequency_penalty": 0.5, "function_call": {"name": "f"},
    "functions": [{"name": "f"}], "logit_bias": {"5": 1}, "modalities": ["audio"], "presence_penalty": 1,
    "prediction": {"type": "content", "content": "x"}, "reasoning_effort": "low",
    "response_format": {"type": "json_object"}, "tool_choice": "required", "tools": [{"type": "function"}],
    "verbosity": "low", "web_search_options": {},
}  # fmt: skip
"""Every field of a chat completion in OpenAI's API that the server does nothing about, asking for something."""


@pytest.mark.parametrize("name", REST_OF_OPENAI)
def test_a_field_that_asks_for_nothing_is_taken_and_any_other_is_refused_by_its_name(name):
    assert parse_body(json.dumps({**CHAT, name: None}).encode(), chat=True).model == "style"
    with pytest.raises(ApiError) as caught:
        parse_body(json.dumps({**CHAT, name: REST_OF_OPENAI[name]}).encode(), chat=True)
    assert caught.value.status == 400 and caught.value.message == f"'{name}' is not supported by this server"


def test_a_message_is_read_as_in_prompt_files_and_what_else_it_says_is_refused_by_its_name():
    def read(**message):
        body = {**CHAT, "messages": [{"content": "x", **message}, *CHAT["messages"]]}
        return parse_body(json.dumps(body).encode(), chat=True).messages[0]

    empty = {"refusal": None, "tool_calls": [], "function_call": None, "annotations": [], "name": ""}
    assert read(role="assistant", **empty) == {"role": "assistant", "content": "x"}
    thought = {"role": "assistant", "content": "x", "reasoning_content": "Hm."}
    assert [read(role="assistant", **{key: "Hm."}) for key in ("reasoning_content", "reasoning", "thinking")] == [
        thought, thought, thought
    ]  # fmt: skip
    tool = {"role": "tool", "content": "x", "name": "clock", "tool_call_id": "1"}
    assert read(**tool) == tool
    for role, key in (("user", "name"), ("assistant", "tool_calls"), ("assistant", "prefix"), ("user", "thinking")):
        with pytest.raises(ApiError, match=rf"'messages\[0\]\.{key}' is not supported") as caught:
            read(role=role, **{key: "x"})
        assert (caught.value.status, caught.value.param) == (400, f"messages[0].{key}")
    with pytest.raises(ApiError, match="has to be a text"):
        read(role="assistant", reasoning=3)
    with pytest.raises(ApiError, match="without a chat template"):
        body = {"model": "style", "prompt": "x", "chat_template_kwargs": {"enable_thinking": True}}
        parse_body(json.dumps(body).encode(), chat=False)


@pytest.mark.parametrize(("size", "status"), [(guard.LARGEST_BODY + 1, 413), (10, 408)])
def test_a_body_that_stops_coming_is_told_as_too_large_when_it_is(monkeypatch, size, status):
    monkeypatch.setattr(guard, "_STALLED", 0.01)

    async def stream():
        yield b" " * size
        await asyncio.sleep(60)

    with pytest.raises(ApiError) as caught:
        asyncio.run(guard.read_body(SimpleNamespace(headers={}, stream=stream)))
    assert caught.value.status == status


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ([], None), ({**CHAT, "stop": [""]}, "stop"), ({**CHAT, "stop": 3}, "stop"),
        ({**CHAT, "logit_bias": []}, "logit_bias"), ({**CHAT, "stream_options": {}}, "stream_options"),
        ({**CHAT, "messages": ["x"]}, "messages[0]"),
        ({**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({**CHAT, "stream": True, "stream_options": {"odd": 1}}, "stream_options"),
    ],
)  # fmt: skip
def test_a_body_of_another_shape_is_400_and_its_place_is_named(body, param):
    with pytest.raises(ApiError) as caught:
        parse_body(json.dumps(body).encode(), chat=True)
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize("prompt", [[], 3, [" "], ""])
def test_a_prompt_is_a_text_or_several(prompt):
    with pytest.raises(ApiError) as caught:
        parse_body(json.dumps({"model": "style", "prompt": prompt}).encode(), chat=False)
    assert (caught.value.status, caught.value.param) == (400, "prompt")


def test_a_message_may_be_in_parts_and_the_limit_of_tokens_has_two_names():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = {**CHAT, "messages": [{"role": "user", "content": parts}], "max_completion_tokens": 7, "top_k": -1}
    asked = parse_body(json.dumps(body).encode(), chat=True)
    assert asked.messages[0]["content"] == "ab" and asked.sampling.max_new_tokens == 7 and asked.sampling.top_k is None
