"""Loss and next-token accuracy on supervised tokens, of a model as it stands, record by record."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from stackctl.engine.data import Example, collate, encode, ensure_chat_template
from stackctl.engine.models import StackedModel, evaluating
from stackctl.engine.records import RecordSet
from stackctl.engine.significance import RecordScore, ratio_error
from stackctl.engine.trainer import supervised_logits
from stackctl.errors import Failed

Progress = Callable[[int], None]


@dataclass(frozen=True)
class DataSet:
    """A data set as one base reads it. ``owners[i]`` is the number of the record that ``examples[i]`` comes from."""

    source: str
    examples: Sequence[Example]
    owners: list[int]


@dataclass(frozen=True)
class Score:
    """What a stack made of a data set: the scores of its records, in their order, and what they come to.

    ``loss`` is the mean cross-entropy (nats) over all supervised tokens, ``accuracy`` the share of these that were the
    likeliest token. Records with nothing to learn are not among them.
    """

    records: list[RecordScore]

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
        """Of ``loss``, with each record a cluster: see :func:`stackctl.engine.significance.ratio_error`."""
        return ratio_error([r.loss for r in self.records], [r.tokens for r in self.records])


def tokenise_for(
    stacked: StackedModel, records: RecordSet, source: str, max_length: int, note: Callable[[str], None]
) -> DataSet:
    """A data set in a base's tokens, cut to what the base reads at once; ``note`` hears what was cut or left out."""
    ensure_chat_template(stacked.tokenizer)
    length = min(max_length, stacked.base.context_length or max_length)
    encoded = encode(records, stacked.tokenizer, max_length=length)
    for text in encoded.notes:
        note(text)
    if encoded.truncated:
        note(f"{encoded.truncated} of {records.count} records of {source} were cut to {length} tokens")
    if encoded.unsupervised:
        note(
            f"{len(encoded.unsupervised)} of {records.count} records of {source} have nothing to learn and do not count"
        )
    assert encoded.owners is not None, "encode keeps them"
    return DataSet(source, encoded.examples, encoded.owners)


def score_stack(
    stacked: StackedModel, name: str, sets: Sequence[DataSet], progress: Progress | None = None
) -> list[Score]:
    """What the stack that is folded in makes of each data set; ``name`` is what errors call it.

    Raises:
        Failed: a loss is no number.
    """
    scores = [_score(stacked, data, progress) for data in sets]
    for data, score in zip(sets, scores, strict=True):
        if not math.isfinite(score.loss):
            raise Failed(f"the loss of {name} on {data.source} is not a finite number", hint="use smaller weights")
    return scores


def _score(stacked: StackedModel, data: DataSet, progress: Progress | None) -> Score:
    by_record: dict[int, list[RecordScore]] = {}
    for owner, part in zip(data.owners, score_examples(stacked.model, data.examples, progress), strict=True):
        by_record.setdefault(owner, []).append(part)
    return Score([_joined(parts) for parts in by_record.values()])


def _joined(parts: Sequence[RecordScore]) -> RecordScore:
    """A record that became several examples is one record all the same."""
    return RecordScore(
        math.fsum(part.loss for part in parts), sum(part.tokens for part in parts), sum(part.correct for part in parts)
    )


def score_examples(
    model: torch.nn.Module, examples: Sequence[Example], progress: Progress | None = None
) -> list[RecordScore]:
    """The score of each example, each alone in its row.

    One at a time: no padding, no mask and no neighbour, so that a number does not depend on the batch.
    """
    device = next(model.parameters()).device
    scores = []
    with evaluating(model):
        for example in examples:
            batch = {key: value.to(device) for key, value in collate([example]).items()}
            logits, labels = supervised_logits(model, batch).float(), batch["labels"]  # (K, vocabulary), (K,)
            loss = float(functional.cross_entropy(logits, labels, reduction="sum").double())
            scores.append(RecordScore(loss, labels.numel(), int((logits.argmax(-1) == labels).sum())))
            if progress:
                progress(1)
    return scores


def record_losses(model: torch.nn.Module, examples: Sequence[Example]) -> list[float]:
    """Summed cross-entropy (nats) of each example's supervised tokens."""
    return [score.loss for score in score_examples(model, examples)]


def supervised_count(examples: Sequence[Example]) -> int:
    """How many tokens of some examples have a label that a model can predict."""
    return sum(example.supervised for example in examples)
