"""Records to examples: every record laid out, tokenised, and cut or split to a length."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

from stackctl.core.errors import Usage
from stackctl.engine.data.examples import IGNORED, Encoded, EncodeOptions, Example, Layout
from stackctl.engine.data.layouts import Layouts
from stackctl.engine.data.tokenize import Tokenise
from stackctl.engine.records.read import RecordStream
from stackctl.engine.records.types import ChatRecord, CompletionRecord, PreferenceRecord, Record, RecordSet, TextRecord

_BATCH = 512
"""Records tokenised in one call: enough for the tokenizer's threads, few enough for the memory that offsets take."""
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
    layouts = Layouts(records, tokenizer, options)
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
