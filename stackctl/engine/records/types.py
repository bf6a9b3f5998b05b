"""What a record is once it was read: a text, something to complete, a conversation, or a pair of answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Format = Literal[
    "text", "messages", "conversations", "conversation", "prompt", "response", "question", "query", "instruction",
    "preference",
]  # fmt: skip
Unit = Literal["line", "record", "file"]
"""What a record's number counts: lines, files of a folder, or records where a file has no lines to speak of."""
Message = dict[str, Any]
"""``{"role": …, "content": …}`` as chat templates take it, both strings. A turn of the assistant may have
``reasoning_content`` (a string) and ``tool_calls``, a turn of a tool ``name`` and ``tool_call_id``."""


@dataclass(frozen=True, slots=True)
class TextRecord:
    """A document to model. ``number`` is its line or its place in the file, from 1."""

    number: int
    text: str


@dataclass(frozen=True, slots=True)
class CompletionRecord:
    """What to complete, and how; ``desired`` is its label, where that was asked for."""

    number: int
    prompt: str
    completion: str
    desired: bool = True


@dataclass(frozen=True, slots=True)
class ChatRecord:
    """A conversation. Of the first ``context`` messages none is to be learned, even when the assistant speaks.

    ``muted`` are the positions of turns that the record says are not to be learned, ``tools`` what could be called,
    ``template`` what the record gives to the chat template (``enable_thinking`` and the like), ``desired`` its label,
    where that was asked for.
    """

    number: int
    messages: list[Message]
    context: int = 0
    muted: frozenset[int] = frozenset()
    tools: list[Any] | None = None
    template: dict[str, Any] = field(default_factory=dict)
    desired: bool = True

    def is_learned(self, position: int) -> bool:
        """Whether the turn at this position is one of the assistant's that is to be learned."""
        spoken = self.messages[position]["role"] == "assistant"
        return spoken and position >= self.context and position not in self.muted


@dataclass(frozen=True, slots=True)
class PreferenceRecord:
    """Two answers to one prompt, of which ``chosen`` is the better; what is to be learned of both comes after it."""

    number: int
    chosen: CompletionRecord | ChatRecord
    rejected: CompletionRecord | ChatRecord


Record = TextRecord | CompletionRecord | ChatRecord | PreferenceRecord


class BadRecord(Exception):
    """What is wrong with one record, without its place. ``column`` is known for broken JSON."""

    def __init__(self, message: str, *, line: int | None = None, column: int | None = None) -> None:
        super().__init__(message)
        self.line, self.column = line, column
