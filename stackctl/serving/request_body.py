"""The body of a request to the API, read strictly: a field of a wrong type, or one that nothing obeys, is an error."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stackctl.core.errors import did_you_mean
from stackctl.serving.response_body import ApiError

if TYPE_CHECKING:
    from stackctl.engine.generation import Sampling

DEFAULT_TOKENS = 256
"""The longest answer when a request does not say, as of ``generate``."""
MOST_CHOICES = 16
MOST_LOGPROBS = 20
"""Of the most likely tokens, as in OpenAI's API."""
_MOST_BRACKETS = 1_000_000
"""Beyond it, a body takes seconds to take apart, and nobody else is answered meanwhile."""
_ROLES = ("system", "developer", "user", "assistant", "tool")
_IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
"""Fields that say nothing about the answer."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},),
    "response_format": ({"type": "text"},), "best_of": (1,), "echo": (False,), "suffix": ("",),
    "tools": ([],), "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False), "functions": ([],),
    "modalities": (["text"],), "function_call": ("none", "auto"), "audio": (), "prediction": (),
    "reasoning_effort": (), "verbosity": (), "web_search_options": (),
}  # fmt: skip
"""Fields that this server has no use for, and the values of them that ask for nothing."""
_OF_TURNS = {"assistant": ("reasoning_content", "reasoning", "thinking"), "tool": ("name", "tool_call_id")}
"""What a message may have beside its content, read as in prompt files; of an assistant it is its thought."""


@dataclass(frozen=True)
class CompletionRequest:
    """What one request asks for. ``messages`` of a chat, else ``prompts``; limits and kinds are checked."""

    model: str
    sampling: Sampling
    messages: tuple[dict[str, str], ...] = ()
    prompts: tuple[str, ...] = ()
    n: int = 1
    stream: bool = False
    include_usage: bool = False


def parse_body(body: bytes, *, chat: bool) -> CompletionRequest:
    """Read the body of a chat completion, or of a completion.

    Raises:
        ApiError: 400, and what is wrong with which field.
    """
    from stackctl.engine.generation import Sampling

    given = _object(body)
    allowed = {*_FIELDS, *_IGNORED, *_NEUTRAL, "model", "stream_options", "max_completion_tokens", "logprobs"}
    allowed |= {"messages", "top_logprobs"} if chat else {"prompt"}
    for name, value in given.items():
        if name not in allowed:
            hint = did_you_mean(name, sorted(allowed), "leave it out")
            raise ApiError(400, f"there is no field '{name[:80]}' ({hint})", code="unknown_field", param=name[:80])
        if name in _NEUTRAL and value is not None and not any(_same(value, neutral) for neutral in _NEUTRAL[name]):
            raise ApiError(400, f"'{name}' is not supported by this server", code="unsupported_field", param=name)
    values = {name: read(given[name], name) for name, read in _FIELDS.items() if given.get(name) is not None}
    longest = values.pop("max_tokens", DEFAULT_TOKENS)
    if (asked := given.get("max_completion_tokens")) is not None:
        longest = _integer(1)(asked, "max_completion_tokens")
    template = values.pop("chat_template_kwargs", {})
    if template and not chat:
        raise _wrong("chat_template_kwargs", "left out: a completion goes on from its text, without a chat template")
    model = _text(given.get("model"), "model")
    answers = {"n": values.pop("n", 1), "stream": values.pop("stream", False)}
    answers["include_usage"] = _include_usage(given.get("stream_options"), answers["stream"])
    top_logprobs = (_chat_logprobs if chat else _logprobs)(given)
    if values.get("top_k", 1) < 1:
        values["top_k"] = None  # -1 and 0 are how others say: all of them
    sampling = Sampling(longest, raw=not chat, template=template, top_logprobs=top_logprobs, **values)
    if chat:
        return CompletionRequest(model, sampling, messages=_messages(given.get("messages")), **answers)
    return CompletionRequest(model, sampling, prompts=_prompts(given.get("prompt")), **answers)


def _object(body: bytes) -> dict[str, Any]:
    def refuse(word: str) -> Any:
        raise ValueError(f"{word} is not JSON")

    if body.count(b"[") + body.count(b"{") > _MOST_BRACKETS:
        raise ApiError(400, f"the body holds more than {_MOST_BRACKETS:,} lists and objects", code="invalid_json")
    try:
        given = json.loads(body.decode("utf-8"), parse_constant=refuse)
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {str(error)[:200]}", code="invalid_json") from None
    if not isinstance(given, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_json")
    return given


def _same(value: Any, neutral: Any) -> bool:
    return type(value) in (type(neutral), float) and bool(value == neutral)


def _wrong(name: str, wanted: str) -> ApiError:
    return ApiError(400, f"'{name}' has to be {wanted}", code="invalid_value", param=name)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _wrong(name, "a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _wrong(name, "Unicode: it holds half a character") from None
    return value


def _boolean(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise _wrong(name, "true or false")
    return value


def _number(low: float, high: float) -> Callable[[Any, str], float]:
    def read(value: Any, name: str) -> float:
        wanted = f"a number from {low:g} to {high:g}"
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _wrong(name, wanted)
        if not (low <= value <= high) or not math.isfinite(value):
            raise _wrong(name, wanted)
        return float(value)

    return read


def _integer(low: int, high: int | None = None) -> Callable[[Any, str], int]:
    def read(value: Any, name: str) -> int:
        wanted = f"a whole number from {low}" + ("" if high is None else f" to {high}")
        if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
            raise _wrong(name, wanted)
        return value

    return read


def _stops(value: Any, name: str) -> tuple[str, ...]:
    stops = tuple(_text(stop, name) for stop in (value if isinstance(value, list) else [value]))
    if not all(stops) or len(stops) > MOST_CHOICES:
        raise _wrong(name, f"a text, or up to {MOST_CHOICES} of them, none empty")
    return stops


def _template(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(name, "an object")
    return value


_FIELDS: dict[str, Callable[[Any, str], Any]] = {
    "max_tokens": _integer(1), "temperature": _number(0, 100), "top_p": _number(0, 1), "top_k": _integer(-1, 1 << 31),
    "min_p": _number(0, 1), "repetition_penalty": _number(1e-6, 100), "seed": _integer(-(1 << 63), (1 << 64) - 1),
    "n": _integer(1, MOST_CHOICES), "stop": _stops, "stream": _boolean, "chat_template_kwargs": _template,
}  # fmt: skip


def _include_usage(options: Any, stream: bool) -> bool:
    if options is None:
        return False
    if not isinstance(options, dict) or not stream:
        raise _wrong("stream_options", "an object, and only with 'stream'")
    if unknown := set(options) - {"include_usage", "include_obfuscation"}:
        raise _wrong("stream_options", f"without '{min(unknown)[:80]}'")
    return _boolean(options.get("include_usage", False), "stream_options.include_usage")


def _chat_logprobs(given: dict[str, Any]) -> int | None:
    """How many of the most likely tokens are told beside the chosen one; None: nothing of either."""
    wanted = given.get("logprobs") is not None and _boolean(given["logprobs"], "logprobs")
    top = given.get("top_logprobs")
    count = 0 if top is None else _integer(0, MOST_LOGPROBS)(top, "top_logprobs")
    if count and not wanted:
        raise _wrong("top_logprobs", "left out, or 'logprobs' has to be true")
    return count if wanted else None


def _logprobs(given: dict[str, Any]) -> int | None:
    count = given.get("logprobs")
    return None if count is None else _integer(0, MOST_LOGPROBS)(count, "logprobs")


def _messages(value: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise _wrong("messages", "a list of messages, not empty")
    messages = tuple(_message(message, f"messages[{number}]") for number, message in enumerate(value))
    if not messages[-1]["content"].strip():
        raise _wrong(f"messages[{len(messages) - 1}].content", "a text of more than white space")
    return messages


def _message(message: Any, place: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise _wrong(place, "an object with 'role' and 'content'")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise _wrong(f"{place}.role", "one of " + ", ".join(_ROLES))
    known = _OF_TURNS.get(role, ())
    for name, value in message.items():
        if value and name not in ("role", "content", *known):  # other programs write all fields, most of them empty
            param = f"{place}.{name[:80]}"
            raise ApiError(400, f"'{param}' is not supported by this server", code="unsupported_field", param=param)
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, f"{place}.content") for part in content)
    read = {"role": "system" if role == "developer" else role, "content": _text(content, f"{place}.content")}
    beside = {name: _text(message[name], f"{place}.{name}") for name in known if message.get(name)}
    if role == "assistant" and beside:  # of several spellings of one thought the first
        beside = {"reasoning_content": next(iter(beside.values()))}
    return read | beside


def _part(part: Any, place: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        raise _wrong(place, "text, or a list of parts of the type text")
    return _text(part.get("text"), place)


def _prompts(value: Any) -> tuple[str, ...]:
    prompts = value if isinstance(value, list) else [value]
    if not prompts or len(prompts) > MOST_CHOICES:
        raise _wrong("prompt", f"a text, or up to {MOST_CHOICES} of them")
    if not all(_text(prompt, "prompt").strip() for prompt in prompts):
        raise _wrong("prompt", "a text of more than white space")
    return tuple(prompts)
