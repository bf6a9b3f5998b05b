"""Loss and next-token accuracy on supervised tokens, of a model as it stands, for each record.

Records share a row, where attention can keep them apart without a mask; there is no padding, and what several of them
begin with is computed once. What shares a row is decided by the records, not by their order, so that the numbers are
the same in any order.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from stackctl.core import NOISE, Say
from stackctl.core.errors import Failed
from stackctl.engine.at_once import AtOnce, computations_at_once, keeps_nothing
from stackctl.engine.data.chat_template import ensure_chat_template
from stackctl.engine.data.embedded_tokens import check_embedded, unembedded_tokens
from stackctl.engine.data.encoding import encode
from stackctl.engine.data.examples import EncodeOptions, Example
from stackctl.engine.data.rows import collate, few_tokens, lengths_of
from stackctl.engine.data.shared_beginnings import shared_with
from stackctl.engine.devices import float64
from stackctl.engine.evaluation.significance import RecordScore, ratio_error, sign_flip_p
from stackctl.engine.generation.reader import Reader
from stackctl.engine.loss.logits import causal_lm, supervised_token_losses
from stackctl.engine.loss.row_layout import choose_layout
from stackctl.engine.loss.segment_attention import OWN
from stackctl.engine.models import StackedModel, evaluating
from stackctl.engine.records.read import RecordStream
from stackctl.jobs import ranks

T = TypeVar("T")
Progress = Callable[[int], None]
_LOOKS = 3
"""Forward passes that it takes to see whether a model can keep records in a row apart."""
_ROW = 512
"""Tokens of the records in a row: products of a good size, and no more logits than a record of this length has."""
_BESIDE = 2 * _ROW
"""Tokens of a row that is computed beside another, at most; so many in all are worth the look whether it may be."""


@dataclass(frozen=True)
class DataSet:
    """A data set as one base reads it. ``owners[i]`` is the number of the record that ``examples[i]`` comes from.

    Of ``pairs`` the chosen and the rejected answers take turns.
    """

    source: str
    examples: Sequence[Example]
    owners: list[int]
    pairs: bool = False


@dataclass(frozen=True)
class Score:
    """What a stack made of a data set: the scores of its records, in their order, and what they come to.

    ``loss`` is the mean cross-entropy (nats) over all supervised tokens, ``accuracy`` the share of these that were the
    likeliest token. Records with nothing to learn are not among them. Of pairs all that is said of the chosen answers,
    and ``gaps`` are by how much (nats) each is likelier than the rejected one.
    """

    records: list[RecordScore]
    gaps: list[float] | None = None

    @property
    def tokens(self) -> int:
        return sum(record.tokens for record in self.records)

    @property
    def loss(self) -> float:
        return math.fsum(record.loss for record in self.records) / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def accuracy(self) -> float:
        return sum(record.correct for record in self.records) / self.tokens

    @property
    def standard_error(self) -> float | None:
        """Of ``loss``, with each record a cluster: see :func:`stackctl.engine.evaluation.significance.ratio_error`."""
        return ratio_error([r.loss for r in self.records], [r.tokens for r in self.records])


@dataclass(frozen=True)
class Judged:
    """The mean losses of two stacks over some data sets, each set counted alike: after less before, and how sure."""

    before: float
    after: float
    standard_error: float | None
    p_value: float

    @property
    def is_better(self) -> bool:
        return self.after < self.before and self.p_value <= NOISE


def judge(before: Sequence[Score], after: Sequence[Score]) -> Judged:
    """Compare two stacks on the same records by the sign-flip test (:func:`sign_flip_p`)."""
    errors = []
    for old, new in zip(before, after, strict=True):
        own = [a.loss - b.loss for a, b in zip(new.records, old.records, strict=True)]
        errors.append(ratio_error(own, [record.tokens for record in old.records]))
    known = [error for error in errors if error is not None]
    return Judged(
        mean_loss(before), mean_loss(after),
        math.hypot(*known) / len(before) if len(known) == len(errors) else None,
        sign_flip_p(record_gaps(before, after)),
    )  # fmt: skip


def record_gaps(before: Sequence[Score], after: Sequence[Score]) -> list[float]:
    """Each record's share in the difference of the mean losses, after less before; they add up to it."""
    return [
        (a.loss - b.loss) / (len(before) * old.tokens)
        for old, new in zip(before, after, strict=True)
        for a, b in zip(new.records, old.records, strict=True)
    ]


def mean_loss(scores: Sequence[Score]) -> float:
    return math.fsum(score.loss for score in scores) / len(scores)


def mean_error(scores: Sequence[Score]) -> float | None:
    """The standard error of :func:`mean_loss`; None where that of one of them is not known or no finite number."""
    errors = [score.standard_error for score in scores]
    known = [error for error in errors if error is not None and math.isfinite(error)]
    return math.hypot(*known) / len(scores) if len(known) == len(scores) else None


def tokenise_for(reader: Reader, records: RecordStream, source: str, options: EncodeOptions, note: Say) -> DataSet:
    """A data set in a base's tokens, cut to what the base reads at once; ``note`` hears what was cut or left out."""
    pairs = options.answers and records.format == "preference"
    ensure_chat_template(reader.tokenizer)
    length = min(options.max_length, reader.base.context_length or options.max_length)
    arguments = {**(reader.base.chat_template_kwargs or {}), **options.template}
    encoded = encode(records, reader.tokenizer, EncodeOptions(length, answers=pairs, template=arguments))
    for text in encoded.notes:
        note(text)
    if encoded.truncated:
        note(f"{encoded.truncated} of {records.count} records of {source} were cut to {length} tokens")
    if encoded.unsupervised:
        note(
            f"{len(encoded.unsupervised)} of {records.count} records of {source} have nothing to learn and do not count"
        )
    if beyond := unembedded_tokens(reader.tokenizer, reader.base.vocabulary_size):
        check_embedded(encoded, beyond, source, records.unit, reader.base.name)
    assert encoded.owners is not None, "encode keeps them"
    return DataSet(source, encoded.examples, encoded.owners, pairs)


class Scoring:
    """Scores one stack after the other on the same data sets."""

    def __init__(self, stacked: StackedModel, sets: Sequence[DataSet]) -> None:
        self._stacked, self._sets = stacked, sets
        self._attention: str | None = None
        self._keeps_nothing: bool | None = None

    def score(self, name: str, progress: Progress | None = None) -> list[Score]:
        """What the stack that is folded in makes of each data set; ``name`` is what errors call it.

        Raises:
            Failed: a loss is no number.
        """
        scores = self.measure(progress)
        for data, score in zip(self._sets, scores, strict=True):
            if not math.isfinite(score.loss):
                raise Failed(f"the loss of {name} on {data.source} is not a finite number", hint="use smaller weights")
        return scores

    def measure(self, progress: Progress | None = None) -> list[Score]:
        """The same, whatever the losses are."""
        with self.sharing() as sharing, self.computing() as at_once:
            return [
                _score(data, score_examples(self._stacked.model, data.examples, progress, sharing, at_once))
                for data in self._sets
            ]

    @contextlib.contextmanager
    def computing(self) -> Iterator[AtOnce | None]:
        """What computes several rows at once, on a CPU, where they are enough and this model may be called so."""
        tokens = sum(int(lengths_of(data.examples).sum()) for data in self._sets)
        count, model = computations_at_once(), self._stacked.model
        if count == 1 or self._stacked.device.type != "cpu" or tokens < _BESIDE:
            yield None
            return
        if self._keeps_nothing is None:  # the architecture decides here, too
            batch = few_tokens(next(data.examples[0] for data in self._sets if data.examples))
            with evaluating(model):
                self._keeps_nothing = keeps_nothing(model, lambda: supervised_token_losses(model, batch))
        if not self._keeps_nothing:
            yield None
            return
        with contextlib.closing(AtOnce(count)) as at_once:
            yield at_once

    @contextlib.contextmanager
    def sharing(self) -> Iterator[bool]:
        """Whether records share rows while the body runs; the model has its own attention again afterwards."""
        examples = [example for data in self._sets for example in data.examples]
        if sum(len(rows_of(data.examples)) for data in self._sets) + _LOOKS > len(examples):
            yield False
            return
        inner = causal_lm(self._stacked.model)
        own = inner.config._attn_implementation
        try:
            if self._attention is None:  # the architecture decides, and no stack changes that
                layout = choose_layout(inner, examples, longest=max(len(example.input_ids) for example in examples))
                self._attention = inner.config._attn_implementation if layout not in ("mask", "one_by_one") else ""
            elif self._attention:
                inner.set_attn_implementation(self._attention)
            yield bool(self._attention)
        finally:
            inner.set_attn_implementation(own)


def _score(data: DataSet, parts: list[RecordScore]) -> Score:
    by_record: dict[int, list[RecordScore]] = {}
    if data.pairs:
        chosen, rejected = parts[::2], parts[1::2]
        return Score(chosen, [other.loss - one.loss for one, other in zip(chosen, rejected, strict=True)])
    for owner, part in zip(data.owners, parts, strict=True):
        by_record.setdefault(owner, []).append(part)
    records = []
    for own in by_record.values():  # a record that became several examples is one record all the same
        losses, tokens, correct = zip(*((part.loss, part.tokens, part.correct) for part in own), strict=True)
        records.append(RecordScore(math.fsum(losses), sum(tokens), sum(correct)))
    return Score(records)


def score_examples(
    model: torch.nn.Module,
    examples: Sequence[Example],
    progress: Progress | None = None,
    sharing: bool = False,
    at_once: AtOnce | None = None,
) -> list[RecordScore]:
    """The score of each example, each alone in its row, or ``sharing`` one with others; rows may be computed at once.

    There is no padding, and nothing of a neighbour in what an example sees, so that sharing changes a loss by rounding
    alone.
    """
    device = next(model.parameters()).device

    def scored(part: Sequence[Example]) -> list[RecordScore]:
        batch = {key: value.to(device) for key, value in collate(part).items()}
        found, counts = supervised_token_losses(model, batch), [example.supervised for example in part]
        assert found.correct is not None, "no gradients are wanted here"
        losses, right = float64(found.losses).split(counts), found.correct.split(counts)
        return [
            RecordScore(math.fsum(loss.tolist()), count, int(correct.sum()))
            for count, loss, correct in zip(counts, losses, right, strict=True)
        ]

    scores: dict[int, RecordScore] = {}
    with evaluating(model):
        for row, own in compute_rows(scored, examples, rows_of(examples, sharing=sharing), at_once):
            scores.update(zip(row, own, strict=True))
            if progress:
                progress(len(row))
    return [scores[number] for number in range(len(examples))]


def compute_rows(
    compute: Callable[[Sequence[Example]], T],
    examples: Sequence[Example],
    rows: Sequence[list[int]],
    at_once: AtOnce | None,
) -> Iterator[tuple[list[int], T]]:
    """Each row with what is computed of its examples: the longest first, and several ``at_once`` if they are short."""
    lengths = lengths_of(examples)

    def tokens(row: list[int]) -> int:
        return int(lengths[row].sum())

    def computed(row: list[int]) -> T:
        return compute([examples[number] for number in row])

    rows = sorted(rows, key=tokens, reverse=True)
    found = at_once.map(computed, rows, lambda row: tokens(row) > _BESIDE) if at_once else map(computed, rows)
    yield from zip(rows, found, strict=True)


def rows_of(examples: Sequence[Example], *, sharing: bool = True) -> list[list[int]]:
    """Which examples share a row, by number: neighbours in the order of their tokens, up to 512 of them, shared
    beginnings once; a longer one stands alone, as all do without ``sharing``."""
    if not sharing:
        return [[number] for number in range(len(examples))]
    rows: list[list[int]] = []
    room = 0
    before: Sequence[int] = ()
    for ids, _, number in sorted((example.input_ids, example.labels, n) for n, example in enumerate(examples)):
        own = len(ids) - shared_with(before, ids)
        if own > room:
            rows.append([])
            room, own = max(_ROW, len(ids)), len(ids)
        rows[-1].append(number)
        room -= own
        before = ids
    return rows


def record_losses(model: torch.nn.Module, examples: Sequence[Example], at_once: AtOnce | None = None) -> list[float]:
    """Summed cross-entropy (nats) of each example's supervised tokens, of which ``at_once`` computes several.

    They share rows where the model has an attention of ours, which was chosen because it keeps them apart; but not
    where several processes train together, which have to take as many forward passes each.
    """
    sharing = causal_lm(model).config._attn_implementation in OWN and ranks.world_size() == 1
    return [score.loss for score in score_examples(model, examples, sharing=sharing, at_once=at_once)]
