"""The thought before an answer: where a text opens and closes it, and what of a turn is thought and what answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from stackctl.engine.records.types import Message


@dataclass(frozen=True)
class Tag:
    """What opens and closes a thought."""

    open: str
    close: str

    def opened(self, prompt: str) -> bool:
        """Whether a prompt ends inside a thought, so that the model begins with it."""
        return prompt.rstrip().endswith(self.open.rstrip())

    def closed(self, prompt: str) -> bool:
        """Whether a prompt ends with the end of a thought, so that the model begins with the answer."""
        return prompt.rstrip().endswith(self.close.strip())


TAGS = (
    Tag("<think>", "</think>"),
    Tag("<thinking>", "</thinking>"),
    Tag("<seed:think>", "</seed:think>"),
    Tag("<longcat_think>", "</longcat_think>"),
    Tag("<reasoning>", "</reasoning>"),
    Tag("[THINK]", "[/THINK]"),
    Tag("◁think▷", "◁/think▷"),
    Tag("<|START_THINKING|>", "<|END_THINKING|>"),
    Tag("<|think_start|>", "<|think_end|>"),
    Tag("<|channel>thought\n", "<channel|>"),
)
"""Those that published models use."""


@dataclass(frozen=True)
class ReasonedAnswer:
    """A turn of the assistant, taken apart.

    ``written`` is a thought as it stands in the content, from behind what opens it up to the answer; empty where it
    was given apart.
    """

    thought: str
    answer: str
    written: str = ""
    tag: Tag = TAGS[0]


def tags_in(source: str) -> tuple[Tag, ...]:
    """The tags that mark a thought under a template with this source: ``<think>``, and those that it knows itself.

    Elsewhere ``<reasoning>`` and its like are words of an answer's own format.
    """
    return TAGS[:1] + tuple(tag for tag in TAGS[1:] if tag.open.strip() in source)


def take_apart(message: Message, tags: Sequence[Tag] = TAGS[:1]) -> ReasonedAnswer:
    """What of a turn is thought: ``reasoning_content``, or what the content begins with between two tags.

    A content that closes ``<think>`` at the edge of a line without having opened it, as models write behind a prompt
    that did, is read so too; in mid-line it is a word of the answer.
    """
    content: str = message.get("content") or ""
    if message.get("reasoning_content"):
        return ReasonedAnswer(message["reasoning_content"], content)
    for tag in tags:
        before, closes, after = content.partition(tag.close)
        inner = before.lstrip().removeprefix(tag.open)
        alone = tag is TAGS[0] and (before.endswith("\n") or after.startswith("\n"))
        if closes and tag.open not in inner and (inner != before.lstrip() or alone):
            space = after[: len(after) - len(after.lstrip())]
            return ReasonedAnswer(inner.strip(), after.lstrip(), inner + tag.close + space, tag)
    return ReasonedAnswer("", content)


def tag_of(prompt: str) -> Tag | None:
    """What the end of a prompt opens, if it ends inside a thought."""
    return next((tag for tag in TAGS if tag.opened(prompt)), None)


def closes(prompt: str) -> bool:
    """Whether a prompt ends behind a thought, which is empty then."""
    return any(tag.closed(prompt) for tag in TAGS)


def without_empty(text: str, tag: Tag) -> tuple[str, str]:
    """A text without the empty thought, or the end of one, that it begins with; and that, from what closes it on."""
    pattern = rf"\s*(?:{re.escape(tag.open)})?\s*({re.escape(tag.close)}\s*)"
    found = re.match(pattern, text)
    return (text[found.end() :], found[1]) if found else (text, "")
