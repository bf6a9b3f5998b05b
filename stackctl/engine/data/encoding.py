"""Records to examples: every record laid out, tokenised, and cut or split to a length."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

from stackctl.core.errors import Usage
from stackctl.engine.data.examples import IGNORED, Encoded, EncodeOptions, Example, Layout, supervised_count
from stackctl.engine.data.layouts import Layouts
from stackctl.engine.data.tokenize import Tokenise
from stackctl.engine.records.read import RecordStream
from stackctl.engine.records.types import ChatRecord, CompletionRecord, PreferenceRecord, Record, TextRecord

_BATCH = 512
"""Records tokenised in one call: enough for the tokenizer's threads, few enough for the memory that offsets take."""
Reading = Callable[[float], None]
"""Told the share (0 to 1) of the data that was read."""


def encode(records: RecordStream, tokenizer: Any, options: EncodeOptions, reading: Reading = lambda _: None) -> Encoded:
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
    pieces = encode_pieces(records, tokenizer, encoded, options, reading)
    encoded.examples = list(itertools.chain.from_iterable(pieces))
    return encoded


def encode_pieces(
    records: RecordStream, tokenizer: Any, encoded: Encoded, options: EncodeOptions, reading: Reading
) -> Iterator[list[Example]]:
    """The examples that :func:`encode` makes, some at a time; ``encoded`` gets everything but the examples."""
    tokenise = Tokenise(tokenizer)
    layouts = Layouts(records, tokenizer, options)
    stream = iter(records.records)
    while batch := list(itertools.islice(stream, _BATCH)):
        laid_out = [(record, layouts.of(record)) for record in batch]
        reading(records.share)
        if layouts.refused:
            continue  # the rest is only looked at for what is wrong with it
        with _all_threads():
            pieces = list(tokenise([layout for _, several in laid_out for layout in several]))
        yield _kept(laid_out, pieces, encoded, options)
    layouts.check()
    encoded.notes += [*records.notes, *layouts.notes()]
    if not encoded.tokens and layouts.muted and not encoded.unsupervised:
        raise Usage(
            f"no record of {records.path} has anything to learn: every turn is marked as not to be learned",
            hint="take the marks off the turns that are to be learned: 'weight', 'train', 'training' or 'loss'",
        )
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
    ready = iter(examples)
    for record, layouts in laid_out:
        texts = list(itertools.islice(ready, len(layouts)))
        kept, cut = (_taught if options.system else _shortened)(record, texts, options)
        if encoded.owners is not None:
            encoded.owners += [record.number] * len(kept)
        encoded.truncated += cut
        if not kept and layouts:
            encoded.unsupervised.append(record.number)
        found += kept
    own = found[::2] if options.system else found
    encoded.desired += sum(example.desired for example in own)
    encoded.tokens += sum(len(example.input_ids) for example in own)
    encoded.supervised_tokens += supervised_count(own)
    return found


def _shortened(record: Record, texts: list[Example], options: EncodeOptions) -> tuple[list[Example], bool]:
    """What is kept of a record's texts, and whether one was cut; of a pair both, or none where nothing differs."""
    kept: list[Example] = []
    cut = False
    for text in texts:
        if options.split_long and isinstance(record, TextRecord):
            kept += _split(text, options.max_length)
        else:
            shorter, was_cut = _cut(text, options.max_length)
            kept, cut = [*kept, shorter], cut or was_cut
    if isinstance(record, PreferenceRecord) and options.answers:
        for number, example in enumerate(kept):
            example.desired = number == 0
        empty = not all(example.input_ids for example in kept)
        return ([] if empty or kept[0].input_ids == kept[-1].input_ids else kept), cut
    desired = record.desired if isinstance(record, CompletionRecord | ChatRecord) else True
    for example in kept:
        example.desired = desired
    return [example for example in kept if example.input_ids], cut


def _taught(record: Record, texts: list[Example], options: EncodeOptions) -> tuple[list[Example], bool]:
    """The same of a record whose texts come twice, each followed by itself behind a system prompt.

    The second has the labels of the first, however long it is.
    """
    kept: list[Example] = []
    cut = False
    for text, behind in zip(texts[::2], texts[1::2], strict=True):
        own, was_cut = _cut(text, options.max_length)
        cut = cut or was_cut
        if own.input_ids:
            kept += [own, _labelled_alike(behind, own, record.number)]
    return kept, cut


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


@contextlib.contextmanager
def _all_threads() -> Iterator[None]:
    """The tokenizer's own threads, which are switched off elsewhere because they do not survive a fork."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = before or "false"


def _cut(example: Example, max_length: int) -> tuple[Example, bool]:
    """At most ``max_length`` tokens, ending with a supervised one, and whether others are lost; empty when there is
    none."""
    length = _end(example.labels[:max_length])
    return Example(example.input_ids[:length], example.labels[:length]), _end(example.labels) > max_length


def _end(labels: list[int]) -> int:
    """How many tokens there are up to the last one that is supervised."""
    length = len(labels)
    while length and labels[length - 1] == IGNORED:
        length -= 1
    return length


def _split(example: Example, max_length: int) -> list[Example]:
    """Pieces of at most ``max_length`` tokens; each begins with the last token of the one before it, for context."""
    pieces = []
    for start in range(0, len(example.input_ids) - 1, max_length - 1):
        labels = example.labels[start : start + max_length]
        labels[0] = IGNORED
        pieces.append(Example(example.input_ids[start : start + max_length], labels))
    return pieces
