"""Answers in the shapes of OpenAI's API: whole, or as chunks of a stream; and errors."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from stackctl.core.errors import NotFound, StackctlError, UnreadableEntry
from stackctl.storage.files import json_line

if TYPE_CHECKING:
    from stackctl.engine.generation.logprobs import TokenLogprob

_REASONS = {"end": "stop", "stop": "stop", "length": "length"}


class Choice(NamedTuple):
    """One answer: its text, what ended it, and how likely its tokens were."""

    text: str
    stop: str
    logprobs: Sequence[TokenLogprob]


@dataclass(frozen=True)
class Completion:
    """One request's answers: of a chat, or of a completion; with ``top_logprobs`` they say how likely tokens were."""

    model: str
    chat: bool
    top_logprobs: int | None = None
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def _document(self, choices: list[dict[str, Any]], *, chunk: bool = False, usage: Any = None) -> dict[str, Any]:
        kind = ("chat.completion" + (".chunk" if chunk else "")) if self.chat else "text_completion"
        prefix = "chatcmpl" if self.chat else "cmpl"
        made = {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}
        return {**made, "choices": choices, **({} if usage is None else {"usage": usage})}

    def whole(self, answers: Sequence[Choice], usage: dict[str, int]) -> dict[str, Any]:
        """The answer of a request, a choice for each."""
        choices = []
        for index, (text, stop, logprobs) in enumerate(answers):
            own = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
            told = self._logprobs(logprobs)
            choices.append({"index": index, **own, "logprobs": told, "finish_reason": _REASONS[stop]})
        return self._document(choices, usage=usage)

    def begin(self, index: int) -> bytes:
        """The first chunk of a choice, which of a chat says who speaks."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None) if self.chat else b""

    def piece(self, index: int, text: str, logprobs: Sequence[TokenLogprob]) -> bytes:
        return self._chunk(index, {"content": text} if self.chat else text, None, logprobs)

    def end(self, index: int, stop: str, logprobs: Sequence[TokenLogprob]) -> bytes:
        return self._chunk(index, {} if self.chat else "", _REASONS[stop], logprobs)

    def _chunk(self, index: int, delta: Any, reason: str | None, logprobs: Sequence[TokenLogprob] = ()) -> bytes:
        own = {"delta": delta} if self.chat else {"text": delta}
        told = self._logprobs(logprobs) if logprobs else None
        return event(self._document([{"index": index, **own, "logprobs": told, "finish_reason": reason}], chunk=True))

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self.top_logprobs is None:
            return None
        if self.chat:
            return {"content": [_chat_token(one) for one in tokens], "refusal": None}
        return {
            "tokens": [_legacy_name(one.content) for one in tokens],
            "token_logprobs": [one.logprob for one in tokens],
            "top_logprobs": [_legacy_top(one) for one in tokens],
            "text_offset": [one.begin for one in tokens],
        }

    def usage(self, usage: dict[str, int]) -> bytes:
        """The last chunk of a stream that was asked for its usage."""
        return event(self._document([], chunk=True, usage=usage))


def _chat_token(one: TokenLogprob) -> dict[str, Any]:
    return {**_named(one.content, one.logprob), "top_logprobs": [_named(*other) for other in one.top]}


def _named(content: bytes, logprob: float) -> dict[str, Any]:
    return {"token": _name(content), "logprob": logprob, "bytes": list(content)}


def _name(content: bytes, prefix: str = "") -> str:
    """A token as text; a part of a character as its bytes, such as ``\\xe6``."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in content)


def _legacy_name(content: bytes) -> str:
    return _name(content, "bytes:")


def _legacy_top(one: TokenLogprob) -> dict[str, float]:
    """By token, the chosen one among them. Of two tokens that are the same text, the likelier."""
    found: dict[str, float] = {}
    for content, logprob in [*one.top, (one.content, one.logprob)]:
        found.setdefault(_legacy_name(content), logprob)
    return found


DONE = b"data: [DONE]\n\n"


def event(document: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json_line(document).encode() + b"\n\n"


_STATUS = {"queue_full": 429, "not_found": 404, "usage": 400, "incompatible": 400, "verification_failed": 400}
_HEADERS = {
    401: {"WWW-Authenticate": "Bearer"}, 408: {"Connection": "close"}, 413: {"Connection": "close"},
    429: {"Retry-After": "1"},
}  # fmt: skip
_TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error"}


class ApiError(Exception):
    """``status`` is HTTP's, ``param`` the field of the body that is wrong."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    @property
    def headers(self) -> dict[str, str] | None:
        """What the answer says besides."""
        return _HEADERS.get(self.status)

    def json(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def api_error(error: Exception) -> ApiError:
    """Any error as one of the API's; what is not expected is told by its type alone."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, StackctlError):
        told = error.message + (f" ({error.hint})" if error.hint else "")
        status = 500 if isinstance(error, UnreadableEntry) else _STATUS.get(error.code, 500)
        code = "model_not_found" if isinstance(error, NotFound) else error.code
        return ApiError(status, told, code=code, param=getattr(error, "param", None))
    return ApiError(500, f"the server failed: {type(error).__name__}", code="internal_error")
