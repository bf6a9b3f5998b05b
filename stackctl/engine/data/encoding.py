"""Records to examples: every record laid out, tokenised, and cut or split to a length.

A conversation is laid out as the chat template renders it, in as few texts as the template allows, and in each text
the spans are marked that the assistant said.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from stackctl.engine.data.examples import IGNORED, Encoded, Example, Layout
from stackctl.engine.data.templates import TEMPLATE_ERRORS, Turns, reason
from stackctl.engine.data.tokenising import Tokenise
from stackctl.engine.records import CompletionRecord, Record, RecordSet, TextRecord
from stackctl.errors import Usage

_BATCH = 512
"""Records tokenised in one call: enough for the tokenizer's threads, few enough for the memory that offsets take."""
_SHOWN = 5


def encode(records: RecordSet, tokenizer: Any, *, max_length: int, split_long: bool = False) -> Encoded:
    """Token ids and labels of all records, in their order.

    * text: every token is supervised, and an EOS after it, so that the model learns where a document ends;
    * prompt and completion: the completion and an EOS after it;
    * conversations: every assistant turn with its end-of-turn token, and nothing else. What follows the last of them
      is left out, since it changes no loss.

    What is longer than ``max_length`` is cut; with ``split_long`` texts are split instead, each piece beginning with
    the last token of the one before it, so that every token is still learned once.

    Raises:
        Usage: the chat template refuses a conversation, or nothing is left to learn.
    """
    encoded = Encoded([])
    laid_out = _lay_out(records, tokenizer, encoded)
    tokenise = Tokenise(tokenizer)
    for batch in _batched(laid_out, _BATCH):
        examples = tokenise([layout for _, layouts in batch for layout in layouts])
        for record, layouts in batch:
            kept: list[Example] = []
            cut = False
            for _, example in zip(layouts, examples, strict=False):
                if split_long and isinstance(record, TextRecord):
                    kept += _split(example, max_length)
                else:
                    needed = _cut(example, len(example.input_ids))
                    cut = cut or len(needed.input_ids) > max_length
                    kept.append(_cut(needed, max_length))
            kept = [example for example in kept if example.input_ids]
            encoded.examples += kept
            encoded.owners += [record.number] * len(kept)
            encoded.truncated += cut
            if not kept:
                encoded.unsupervised.append(record.number)
    if not encoded.examples:
        raise Usage(
            f"no record of {records.path} has anything to learn within {max_length} tokens", hint="raise --max-length"
        )
    encoded.tokens = sum(len(example.input_ids) for example in encoded.examples)
    encoded.supervised_tokens = sum(len(example.labels) - example.labels.count(IGNORED) for example in encoded.examples)
    return encoded


def _lay_out(records: RecordSet, tokenizer: Any, encoded: Encoded) -> list[tuple[Record, list[Layout]]]:
    """The texts of every record, and into ``encoded.notes`` what is unusual about them."""
    turns: Turns | None = None
    laid_out: list[tuple[Record, list[Layout]]] = []
    problems: list[str] = []
    several = irregular = 0
    for record in records.records:
        if isinstance(record, TextRecord):
            layouts = [Layout(record.text, [(0, len(record.text))], document=True, ends=True)]
        elif isinstance(record, CompletionRecord):
            text = record.prompt + record.completion
            layouts = [Layout(text, [(len(record.prompt), len(text))], document=True, ends=True)]
        else:
            turns = turns or Turns(tokenizer)
            try:
                layouts, regular = turns.layouts(record)
            except TEMPLATE_ERRORS as error:
                problems.append(f"{records.place(record.number)}: {reason(error)}")
                continue
            several += len(layouts) > 1
            irregular += not regular
        laid_out.append((record, layouts))
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise Usage(
            f"{records.path}: the base's chat template refuses {'; '.join(problems[:_SHOWN])}{more}",
            hint="change these conversations to what the template takes, or use another base",
        )
    if several:
        encoded.notes.append(
            f"the chat template renders earlier assistant turns differently: {several} of {records.count} "
            "conversations became one example per turn"
        )
    if irregular:
        encoded.notes.append(
            f"the chat template renders a finished turn after something else than its generation prompt: "
            f"{irregular} of {records.count} conversations were laid out after the prompt"
        )
    return laid_out


def _batched(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


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
