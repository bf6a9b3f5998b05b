"""Answers in the shapes of OpenAI's API: whole, or as chunks of a stream."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

_REASONS = {"end": "stop", "stop": "stop", "length": "length"}


@dataclass(frozen=True)
class Shape:
    """One request's answers: of a chat, or of a completion."""

    model: str
    chat: bool
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def _document(self, choices: list[dict[str, Any]], *, chunk: bool = False, usage: Any = None) -> dict[str, Any]:
        kind = ("chat.completion" + (".chunk" if chunk else "")) if self.chat else "text_completion"
        prefix = "chatcmpl" if self.chat else "cmpl"
        made = {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}
        return {**made, "choices": choices, **({} if usage is None else {"usage": usage})}

    def whole(self, texts: list[tuple[str, str]], usage: dict[str, int]) -> dict[str, Any]:
        """The answer of a request: (text, stop) of each choice."""
        choices = []
        for index, (text, stop) in enumerate(texts):
            own = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
            choices.append({"index": index, **own, "logprobs": None, "finish_reason": _REASONS[stop]})
        return self._document(choices, usage=usage)

    def begin(self, index: int) -> bytes:
        """The first chunk of a choice, which of a chat says who speaks."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None) if self.chat else b""

    def piece(self, index: int, text: str) -> bytes:
        return self._chunk(index, {"content": text} if self.chat else text, None)

    def end(self, index: int, stop: str) -> bytes:
        return self._chunk(index, {} if self.chat else "", _REASONS[stop])

    def _chunk(self, index: int, delta: Any, reason: str | None) -> bytes:
        own = {"delta": delta} if self.chat else {"text": delta}
        return event(self._document([{"index": index, **own, "logprobs": None, "finish_reason": reason}], chunk=True))

    def usage(self, usage: dict[str, int]) -> bytes:
        """The last chunk of a stream that was asked for its usage."""
        return event(self._document([], chunk=True, usage=usage))


DONE = b"data: [DONE]\n\n"


def event(document: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(document, ensure_ascii=False).encode() + b"\n\n"
