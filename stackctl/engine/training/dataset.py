"""A job's data, read and tokenised, and what a person should know about it."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stackctl.core import Say
from stackctl.core.errors import Incompatible, Usage
from stackctl.core.schema import Base
from stackctl.core.template_arguments import template_arguments
from stackctl.engine.data.chat_template import ChatTemplate
from stackctl.engine.data.embedded_tokens import check_embedded, unembedded_tokens
from stackctl.engine.data.encoding import Reading
from stackctl.engine.data.examples import IGNORED, Encoded, EncodeOptions, Example
from stackctl.engine.data.rows import Rows, TaughtExamples, longest_of, one_by_one, pack, pairs_of
from stackctl.engine.data.token_cache import encode_cached
from stackctl.engine.records.read import RecordStream, open_records
from stackctl.engine.training.trained_tokens import frozen_tokens
from stackctl.jobs.job import PreparedJob
from stackctl.render.record_preview import Span, render_preview
from stackctl.render.terminal import Painted, colours_on, width_of

_LOOKED_AT = 100
"""How many examples are looked at for tokens that the base never learned."""
_NAMED = 20
"""How many records a note names."""


@dataclass(frozen=True)
class Corpus:
    """A job's data, read and tokenised."""

    records: RecordStream
    encoded: Encoded
    rows: Rows
    """What one place of a micro-batch holds: one record, or a packed sequence of several."""
    held_out: RecordStream | None
    evaluation: Encoded | None
    max_length: int

    @property
    def longest(self) -> int:
        """The tokens of the longest record, held-out ones among them."""
        return max(longest_of(own.examples) for own in (self.encoded, self.evaluation) if own)


def read_corpus(
    prepared: PreparedJob, tokenizer: Any, say: Say, reading: Reading = lambda _: None, trained: Collection[int] = ()
) -> Corpus:
    """Read and tokenise a job's data, and say what a person should know about it.

    ``trained`` are the tokens whose rows the job trains.

    Raises:
        NotFound, Usage: it is missing, malformed, or nothing in it can be learned from.
        Incompatible: it uses tokens that the base has no row for.
    """
    job = prepared.job
    length = min(job.max_length, prepared.base.context_length or job.max_length)
    if length < job.max_length:
        say(f"--max-length {job.max_length} is more than {prepared.base.name} reads at once: {length} is used")
    records = open_records(prepared.data)
    if job.pack and (shape := records.peek_format()) not in ("text", None):
        raise Usage(f"--pack joins text records, and {prepared.data} holds {shape}", hint="leave out --pack")

    held_out = open_records(prepared.eval_data) if prepared.eval_data else None
    for source in (records, held_out):
        if source and job.prefers:
            _check_shape(source, job.objective)
            source.labelled = job.objective == "kto"

    options = EncodeOptions(
        length, answers=job.prefers, template=template_arguments(job.chat_template_kwargs),
        system=(prepared.teacher.system if prepared.teacher else None) or "",
    )  # fmt: skip
    encoded = _encode(records, prepared, tokenizer, replace(options, split_long=job.pack), reading)
    evaluation = _encode(held_out, prepared, tokenizer, options, reading) if held_out else None
    if job.prefers and records.format == "preference":
        rows = pairs_of(encoded.examples)
    else:
        rows = pack(encoded.examples, length) if job.pack else one_by_one(encoded.examples)
    corpus = Corpus(records, encoded, rows, held_out, evaluation, length)
    _tell(corpus, prepared, tokenizer, say, {*trained, *frozen_tokens(prepared)})
    return corpus


def _encode(
    source: RecordStream, prepared: PreparedJob, tokenizer: Any, options: EncodeOptions, reading: Reading
) -> Encoded:
    """A source in tokens, as the base can read them."""
    base = prepared.base
    if options.system and not ChatTemplate(tokenizer).role("system")[1]:
        raise Incompatible(
            f"the chat template of '{base.name}' shows no system prompt, which --system needs",
            hint="leave out --system, or use a base whose template has that role",
        )
    beyond = unembedded_tokens(tokenizer, base.vocabulary_size)
    cache = prepared.job.cache and not beyond  # what lies in the cache does not know its lines
    found = encode_cached(source, tokenizer, options, reading, cache=cache)
    if beyond:
        check_embedded(found, beyond, source.path, source.unit, base.name)
    if options.system:
        found.examples = TaughtExamples(found.examples)
        if base.context_length and (over := longest_of(found.examples) - base.context_length) > 0:
            raise Usage(
                f"behind the system prompt a record of {source.path} has {base.context_length + over} tokens, and "
                f"{base.name} reads {base.context_length} at once",
                hint=f"use a --max-length below {max(options.max_length - over, 2)}, or a shorter prompt",
            )
    return found


def _tell(corpus: Corpus, prepared: PreparedJob, tokenizer: Any, say: Say, trained: Collection[int]) -> None:
    """What was cut or left out of a job's data, how much of it is learned, and its first record.

    ``trained`` are the tokens whose rows are trained, or were for the frozen stack.
    """
    records, encoded, length = corpus.records, corpus.encoded, corpus.max_length
    for note in encoded.notes:
        say(f"note: {note}")
    if encoded.truncated:
        say(f"note: {encoded.truncated} of {records.count} records were cut to {length} tokens (--max-length)")
    if encoded.unsupervised:
        more = ", …" if len(encoded.unsupervised) > _NAMED else ""
        named = ", ".join(map(str, encoded.unsupervised[:_NAMED])) + more
        say(f"note: nothing can be learned within {length} tokens from {records.unit} {named}: left out")
    if prepared.job.objective == "kto" and encoded.desired in (0, len(encoded.examples)):
        kind = "true" if encoded.desired else "false"
        say(
            f"note: every label is {kind}: kto has nothing to tell apart, and only makes all answers "
            f"{'likelier' if encoded.desired else 'less likely'}"
        )
    share = encoded.supervised_tokens / max(encoded.tokens, 1)
    say(f"{records.count} {records.format} records, {encoded.tokens:,} tokens, {share:.0%} of them supervised")
    if untrained := _untrained(encoded, tokenizer, prepared.base, trained):
        say(f"note: {untrained}")
    colours = colours_on(sys.stderr)
    does = "is learned" if encoded.examples[0].desired else "is to be avoided"
    say(f"what {does} of the first record is {'green' if colours else 'in ⟦brackets⟧'}:")
    pairs = prepared.job.prefers and records.format == "preference"
    for number, parts in enumerate(preview_parts(encoded.examples[: 2 if pairs else 1], tokenizer)):
        if number:
            say("and what is rejected, behind the same beginning:")
        say(Painted(render_preview(parts, colours=colours, width=width_of(sys.stderr))))


def _check_shape(records: RecordStream, objective: str) -> None:
    """What an objective learns from.

    Raises:
        Usage: the records are something else.
    """
    shape = records.peek_format()
    if objective == "kto" and shape == "text":
        raise Usage(
            f"--objective kto takes answers with a label, and {records.path} holds text",
            hint='give records of {"prompt", "completion", "label"}, the label true or false',
        )
    if objective != "kto" and shape not in ("preference", None):
        raise Usage(
            f"--objective {objective} takes pairs of answers, and {records.path} holds {shape}",
            hint='give records of {"prompt", "chosen", "rejected"}, or leave out --objective',
        )


def _untrained(encoded: Encoded, tokenizer: Any, base: Base, trained: Collection[int]) -> str | None:
    """What to know where the first examples have tokens that a base never learned, and nobody else trains."""
    found = zip(tokenizer.convert_tokens_to_ids(base.untrained_tokens), base.untrained_tokens, strict=True)
    numbers = {number: token for number, token in found if number not in trained}
    if not numbers:
        return None
    first = [encoded.examples[index] for index in range(min(len(encoded.examples), _LOOKED_AT))]
    used = {token for example in first for token in example.input_ids if token in numbers}
    if not used:
        return None
    named = ", ".join(token for number, token in numbers.items() if number in used)
    learned = any(label in used for example in first for label in example.labels)
    what = f"{base.name} never learned {named}: their rows are as they were initialised, and this adapter does not "
    return what + (
        "train them, so that it may not learn to write them" if learned else "train them"
    ) + "; --train-tokens auto does"  # fmt: skip


def preview_parts(examples: Sequence[Example], tokenizer: Any) -> list[list[Span]]:
    """The texts of examples, special tokens and all, in pieces that are learned or not.

    What the answers of a pair share stands in the first one alone.
    """
    found = []
    tokens = [list(zip(example.input_ids, example.labels, strict=True)) for example in examples]
    for number, own in enumerate(tokens):
        both = zip(tokens[0], own, strict=False) if number else ()
        shared = itertools.takewhile(lambda two: two[0] == two[1] and two[0][1] == IGNORED, both)
        runs = itertools.groupby(own[len(list(shared)) :], key=lambda pair: pair[1] != IGNORED)
        texts = ((tokenizer.decode([token for token, _ in run], skip_special_tokens=False), how) for how, run in runs)
        found.append(list(texts))
    return found
