"""Records to examples: every record laid out, tokenised, and cut or split to a length.

A conversation is laid out as the chat template renders it, in as few texts as the template allows, and in each text
the spans are marked that the assistant said.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from stackctl.core.errors import Usage, first_line
from stackctl.engine.data.chat_template import TEMPLATE_ERRORS, ChatTemplate
from stackctl.engine.data.conversation import converse
from stackctl.engine.data.examples import IGNORED, Encoded, EncodeOptions, Example, Layout
from stackctl.engine.data.tokenize import Tokenise
from stackctl.engine.data.turns import Turns
from stackctl.engine.records import (
    ChatRecord,
    CompletionRecord,
    PreferenceRecord,
    Record,
    RecordSet,
    RecordStream,
    TextRecord,
)

_BATCH = 512
"""Records tokenised in one call: enough for the tokenizer's threads, few enough for the memory that offsets take."""
_SHOWN = 5
_QUOTED = 50
"""Characters of a template's own words that a note repeats."""

Reading = Callable[[float], None]
"""Told the share (0 to 1) of the data that was read."""


def encode(
    records: RecordSet | RecordStream, tokenizer: Any, options: EncodeOptions, reading: Reading = lambda _: None
) -> Encoded:
    """Token ids and labels of all records, in their order.

    * text: every token is supervised, and an EOS after it, so that the model learns where a document ends;
    * prompt and completion: the completion and an EOS after it;
    * pairs of answers: the chosen one as the other kinds, or both, one after the other;
    * conversations: for every assistant turn what the model has to write behind the generation prompt of that moment,
      up to its end of turn, and nothing else. What follows the last of them is left out, since it changes no loss.

    Raises:
        Usage: the chat template refuses a conversation, or nothing is left to learn.
    """
    encoded = Encoded([], owners=[])
    examples: list[Example] = []
    for some in encode_pieces(records, tokenizer, encoded, options, reading):
        examples += some
    encoded.examples = examples
    return encoded


def encode_pieces(
    records: RecordSet | RecordStream, tokenizer: Any, encoded: Encoded, options: EncodeOptions, reading: Reading
) -> Iterator[list[Example]]:
    """The examples that :func:`encode` makes, some at a time; ``encoded`` gets everything but the examples."""
    tokenise = Tokenise(tokenizer)
    layouts = _Layouts(records, tokenizer, options)
    stream = iter(records.records)
    while batch := list(itertools.islice(stream, _BATCH)):
        laid_out = [(record, layouts.of(record)) for record in batch]
        reading(records.share if isinstance(records, RecordStream) else 0.0)
        if layouts.refused:
            continue  # the rest is only looked at for what is wrong with it
        with _all_threads():
            pieces = list(tokenise([layout for _, several in laid_out for layout in several]))
        yield (_kept_pairs if options.system else _kept)(laid_out, pieces, encoded, options)
    layouts.check()
    encoded.notes += [*records.notes, *layouts.notes()]
    if not encoded.tokens:
        raise Usage(
            f"no record of {records.path} has anything to learn within {options.max_length} tokens",
            hint="raise --max-length",
        )


def _kept(
    laid_out: list[tuple[Record, list[Layout]]], examples: list[Example], encoded: Encoded, options: EncodeOptions
) -> list[Example]:
    """What is left of some records within ``max_length``; what was lost is counted."""
    found: list[Example] = []
    max_length = options.max_length
    ready = iter(examples)
    for record, layouts in laid_out:
        kept: list[Example] = []
        cut = False
        for example in itertools.islice(ready, len(layouts)):
            if options.split_long and isinstance(record, TextRecord):
                kept += _split(example, max_length)
            else:
                needed = _cut(example, len(example.input_ids))
                cut = cut or len(needed.input_ids) > max_length
                kept.append(_cut(needed, max_length))
        whole = all(example.input_ids for example in kept) or not isinstance(record, PreferenceRecord)
        for number, example in enumerate(kept):
            example.desired = number == 0 if isinstance(record, PreferenceRecord) else _is_desired(record)
        kept = [example for example in kept if example.input_ids] if whole else []
        if encoded.owners is not None:
            encoded.owners += [record.number] * len(kept)
        encoded.truncated += cut
        if not kept and layouts:
            encoded.unsupervised.append(record.number)
        found += kept
    encoded.desired += sum(example.desired for example in found)
    encoded.tokens += sum(len(example.input_ids) for example in found)
    encoded.supervised_tokens += sum(example.supervised for example in found)
    return found


def _kept_pairs(
    laid_out: list[tuple[Record, list[Layout]]], examples: list[Example], encoded: Encoded, options: EncodeOptions
) -> list[Example]:
    """The same of records whose texts come twice, each followed by itself behind a system prompt.

    The second has the labels of the first, however long it is; counted is the first alone.
    """
    found: list[Example] = []
    ready = iter(examples)
    for record, layouts in laid_out:
        cut, before = False, len(found)
        texts = list(itertools.islice(ready, len(layouts)))
        for own, behind in zip(texts[::2], texts[1::2], strict=True):
            needed = _cut(own, len(own.input_ids))
            cut = cut or len(needed.input_ids) > options.max_length
            kept = _cut(needed, options.max_length)
            if kept.input_ids:
                found += [kept, _labelled_alike(behind, kept, record.number)]
                encoded.tokens += len(kept.input_ids)
                encoded.supervised_tokens += kept.supervised
        if encoded.owners is not None:
            encoded.owners += [record.number] * (len(found) - before)
        encoded.truncated += cut
        if len(found) == before and layouts:
            encoded.unsupervised.append(record.number)
    encoded.desired += len(found) // 2
    return found


def _labelled_alike(behind: Example, own: Example, number: int) -> Example:
    """As much of an example as has the labels of another.

    Raises:
        Usage: it has others.
    """
    wanted = [label for label in own.labels if label != IGNORED]
    places = [place for place, label in enumerate(behind.labels) if label != IGNORED][: len(wanted)]
    if [behind.labels[place] for place in places] != wanted:
        raise Usage(
            f"record {number}: behind the system prompt its answers are other tokens",
            hint="leave that record out, or use a base whose chat template renders answers alike",
        )
    return Example(behind.input_ids[: places[-1] + 1], behind.labels[: places[-1] + 1])


def _is_desired(record: Record) -> bool:
    return record.desired if isinstance(record, CompletionRecord | ChatRecord) else True


@contextlib.contextmanager
def _all_threads() -> Iterator[None]:
    """The tokenizer's own threads, which are switched off elsewhere because they do not survive a fork."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = before or "false"


class _Layouts:
    """The texts of records, and what is unusual about them."""

    def __init__(self, records: RecordSet | RecordStream, tokenizer: Any, options: EncodeOptions) -> None:
        self._records, self._tokenizer, self._options = records, tokenizer, options
        self._turns: tuple[ChatTemplate, Turns] | None = None
        self._problems: list[str] = []
        self._said: Counter[str] = Counter()
        self._said_last: dict[str, int] = {}
        self._several = self._muted = self._unread = 0
        self.refused = 0

    def of(self, record: Record) -> list[Layout]:
        """The texts of a record; of a pair the chosen one, or both where answers are asked for, each in one text."""
        if isinstance(record, PreferenceRecord):
            if not self._options.answers:
                self._unread += 1
                return self._of_one(record.chosen)
            both = [self._answer(record.chosen), self._answer(record.rejected)]
            return [layouts[0] for layouts in both] if all(both) else []
        if self._options.system:
            return self._twice(record)
        return self._answer(record) if self._options.answers else self._of_one(record)

    def _twice(self, record: TextRecord | CompletionRecord | ChatRecord) -> list[Layout]:
        """Each text of a conversation followed by itself behind the system prompt."""
        if not isinstance(record, ChatRecord):
            raise Usage(
                f"{self._records.path}: {self._records.place(record.number)} is no conversation, and a system prompt "
                "stands before those",
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
            self._refuse(record, "it renders earlier turns differently, so that an answer of several is no one text")
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
        if self.refused <= _SHOWN:
            self._problems.append(f"{self._records.place(record.number)}: {why}")

    def _of_chat(self, record: ChatRecord, template: ChatTemplate, turns: Turns) -> list[Layout]:
        """Every assistant turn that is to be learned, in as few texts as possible.

        One text holds them all when the template renders a turn the same whether or not others follow. Qwen3's does
        not (it takes ``<think>`` out of earlier turns), nor one that ends no turn, where EOS does: then a turn has a
        text of its own, that of inference.
        """
        learned = [position for position in range(len(record.messages)) if record.is_learned(position)]
        if not learned:
            self._muted += 1
            return []
        talk = converse(template, record.messages, record.tools, {**self._options.template, **record.template})
        said = set(talk.said)
        if turns.preamble and not any(message["role"] in ("system", "developer") for message in talk.messages):
            said.add(f"puts {_cut_text(turns.preamble)!r} before a conversation without a system message")
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
            more = f"; and {self.refused - _SHOWN} more" if self.refused > _SHOWN else ""
            raise Usage(
                f"{self._records.path}: the base's chat template refuses {'; '.join(self._problems)}{more}",
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
        if self._muted:
            notes.append(f"every turn is marked as not to be learned: {self._muted} of {count} conversations left out")
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


def _cut_text(text: str) -> str:
    return text if len(text) <= _QUOTED else text[:_QUOTED] + "…"


def _cut(example: Example, max_length: int) -> Example:
    """At most ``max_length`` tokens, ending with a supervised one; empty when there is none."""
    ids, labels = example.input_ids[:max_length], example.labels[:max_length]
    length = len(labels)
    while length and labels[length - 1] == IGNORED:
        length -= 1
    return Example(ids[:length], labels[:length])


def _split(example: Example, max_length: int) -> list[Example]:
    """Pieces of at most ``max_length`` tokens; each begins with the last token of the one before it, for context."""
    pieces = []
    for start in range(0, len(example.input_ids) - 1, max_length - 1):
        labels = example.labels[start : start + max_length]
        labels[0] = IGNORED
        pieces.append(Example(example.input_ids[start : start + max_length], labels))
    return pieces
