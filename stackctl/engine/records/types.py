"""What a record is once it was read: a text, something to complete, or a conversation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Format = Literal["text", "messages", "conversations", "prompt", "instruction"]
Unit = Literal["line", "record"]
"""What a record's number counts: lines, or records where a file has no lines to speak of (JSON lists, tables)."""
Message = dict[str, str]
"""``{"role": …, "content": …}``, as chat templates take it."""


@dataclass(frozen=True, slots=True)
class TextRecord:
    """A document to model. ``number`` is its line or its place in the file, from 1."""

    number: int
    text: str


@dataclass(frozen=True, slots=True)
class CompletionRecord:
    """What to complete, and how."""

    number: int
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class ChatRecord:
    """A conversation. Of the first ``context`` messages none is to be learned, even when the assistant speaks."""

    number: int
    messages: list[Message]
    context: int = 0


Record = TextRecord | CompletionRecord | ChatRecord


@dataclass(frozen=True)
class RecordSet:
    """The records of one source, all of one shape.

    ``sha256`` is that of the file's bytes, or of a Hub data set's fingerprint. ``unit`` is what a record's number
    counts: lines, or records where a file has no lines to speak of (JSON lists, Parquet, the Hub).
    """

    records: list[Record]
    format: Format
    path: str
    sha256: str
    count: int
    unit: Unit = "line"

    def place(self, number: int) -> str:
        """``line 3``: where a record stands, for messages."""
        return f"{self.unit} {number}"


class BadRecord(Exception):
    """What is wrong with one record, without its place. ``column`` is known for broken JSON."""

    def __init__(self, message: str, *, line: int | None = None, column: int | None = None) -> None:
        super().__init__(message)
        self.line, self.column = line, column
