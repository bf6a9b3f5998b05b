"""Records to texts with the spans in them that are learned.

A conversation is laid out as the chat template renders it, in as few texts as the template allows, and in each text
the spans are marked that the assistant said.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from stackctl.core.errors import SHOWN_PROBLEMS, Usage, first_line, listed_problems
from stackctl.engine.data.chat_template import TEMPLATE_ERRORS, ChatTemplate
from stackctl.engine.data.conversation import converse
from stackctl.engine.data.examples import EncodeOptions, Layout
from stackctl.engine.data.turns import Turns
from stackctl.engine.records.read import RecordStream
from stackctl.engine.records.types import ChatRecord, CompletionRecord, PreferenceRecord, Record, TextRecord
from stackctl.render.terminal import shortened

_QUOTED = 51
"""Characters of a template's own words that a note repeats."""


class Layouts:
    """The texts of records, and what is unusual about them."""

    def __init__(self, records: RecordStream, tokenizer: Any, options: EncodeOptions) -> None:
        self._records, self._tokenizer, self._options = records, tokenizer, options
        self._turns: tuple[ChatTemplate, Turns] | None = None
        self._problems: list[str] = []
        self._said: Counter[str] = Counter()
        self._said_last: dict[str, int] = {}
        self._several = self._unread = 0
        self.muted = 0
        """Conversations of which nothing is to be learned."""
        self.refused = 0

    def of(self, record: Record) -> list[Layout]:
        """The texts of a record; of a pair the chosen one, or both where answers are asked for, each in one text."""
        if isinstance(record, PreferenceRecord):
            if self._options.answers:
                both = [self._answer(record.chosen), self._answer(record.rejected)]
                return [layouts[0] for layouts in both] if all(both) else []
            self._unread += 1
            record = record.chosen
        if self._options.system:
            return self._twice(record)
        return self._answer(record) if self._options.answers else self._of_one(record)

    def _twice(self, record: TextRecord | CompletionRecord | ChatRecord) -> list[Layout]:
        """Each text of a conversation followed by itself behind the system prompt."""
        if not isinstance(record, ChatRecord):
            raise Usage(
                f"{self._records.path}: {self._records.place(record.number)} is not a conversation, and only "
                "conversations have a system prompt",
                hint='give records of {"messages"}, or leave out --system',
            )
        own, several = self._of_one(record), self._several
        behind = self._of_one(behind_system(record, self._options.system)) if own else []
        self._several = several  # a conversation counts once
        if len(own) != len(behind):
            self._refuse(record, "behind the system prompt it renders the turns as other texts")
            return []
        return [layout for both in zip(own, behind, strict=True) for layout in both]

    def _answer(self, record: TextRecord | CompletionRecord | ChatRecord) -> list[Layout]:
        """The one text of an answer."""
        layouts = self._of_one(record)
        if len(layouts) > 1:
            self._refuse(record, "it renders earlier turns differently, so that no single text holds several answers")
            return []
        return layouts

    def _of_one(self, record: TextRecord | CompletionRecord | ChatRecord) -> list[Layout]:
        if isinstance(record, TextRecord):
            return [Layout(record.text, [(0, len(record.text))], document=True, ends=True)]
        if isinstance(record, CompletionRecord):
            text = record.prompt + record.completion
            return [Layout(text, [(len(record.prompt), len(text))], document=True, ends=True)]
        if self._turns is None:
            template = ChatTemplate(self._tokenizer)
            self._turns = template, Turns(template)
        try:
            return self._of_chat(record, *self._turns)
        except TEMPLATE_ERRORS as error:
            self._refuse(record, first_line(error))
            return []

    def _refuse(self, record: Record, why: str) -> None:
        self.refused += 1
        if self.refused <= SHOWN_PROBLEMS:
            self._problems.append(f"{self._records.place(record.number)}: {why}")

    def _of_chat(self, record: ChatRecord, template: ChatTemplate, turns: Turns) -> list[Layout]:
        """Every assistant turn that is to be learned, in as few texts as possible.

        One text holds them all when the template renders a turn the same whether or not others follow. Qwen3's does
        not (it takes ``<think>`` out of earlier turns), nor one that ends no turn, where EOS does: then a turn has a
        text of its own, that of inference.
        """
        learned = [position for position in range(len(record.messages)) if record.is_learned(position)]
        if not learned:
            self.muted += 1
            return []
        talk = converse(template, record.messages, record.tools, {**self._options.template, **record.template})
        said = set(talk.said)
        if turns.preamble and not any(message["role"] in ("system", "developer") for message in talk.messages):
            said.add(f"puts {shortened(turns.preamble, _QUOTED)!r} before a conversation without a system message")
        layouts: list[Layout] = []
        ends = not turns.end.strip()
        for position in reversed(learned):
            turn = turns.turn(talk, position)
            said.update(turn.said)
            span = len(turn.prompt), len(turn.text)
            for layout in layouts if not ends else ():
                if span[1] <= layout.spans[0][0] and layout.text.startswith(turn.text):
                    layout.spans.insert(0, span)
                    break
            else:
                layouts.append(Layout(turn.text + turns.space_after(turn), [span], ends=ends))
        hidden = (role for role in turns.unseen(talk, learned[-1]) if template.role(role)[1])
        said.update(f"shows nothing of a turn of the role '{role}'" for role in hidden)
        self._said.update(text for text in said if self._said_last.get(text) != record.number)  # a pair counts once
        self._said_last.update(dict.fromkeys(said, record.number))
        self._several += len(layouts) > 1
        return layouts[::-1]

    def check(self) -> None:
        """Raise what the template refused, all of it at once."""
        if self.refused:
            problems = listed_problems(self._problems, self.refused)
            raise Usage(
                f"{self._records.path}: the base's chat template refuses {problems}",
                hint="change these conversations to what the template takes, or use another base",
            )

    def notes(self) -> list[str]:
        count = self._records.count
        notes = []
        if self._several:
            notes.append(
                f"the chat template renders earlier assistant turns differently: {self._several} of "
                f"{count} conversations became one example per turn"
            )
        if self._unread:
            notes.append(f"of {self._unread} pairs of answers 'chosen' is read, and 'rejected' is ignored")
        notes += [f"the chat template {said}: {number} of {count} conversations" for said, number in self._said.items()]
        if self._options.template and self._turns is None:
            given = ", ".join(self._options.template)
            notes.append(f"no record is a conversation, so that the chat template is not given {given}")
        if self.muted:
            notes.append(f"every turn is marked as not to be learned: {self.muted} of {count} conversations left out")
        return notes


def behind_system(record: ChatRecord, system: str) -> ChatRecord:
    """A conversation behind a system prompt; a system message of its own follows in the same turn."""
    first, *rest = record.messages
    if first["role"] in ("system", "developer"):
        return replace(record, messages=[{**first, "content": f"{system}\n\n{first['content']}"}, *rest])
    return replace(
        record,
        messages=[{"role": "system", "content": system}, *record.messages],
        context=record.context + 1,
        muted=frozenset(place + 1 for place in record.muted),
    )
