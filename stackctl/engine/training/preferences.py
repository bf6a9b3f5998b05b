"""Answers in a run: what is known of them beforehand, and the losses and margins of a micro-batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stackctl.core.train_job import TrainJob
from stackctl.engine.at_once import AtOnce
from stackctl.engine.data.examples import IGNORED, Example, LazySequence
from stackctl.engine.data.rows import collate
from stackctl.engine.devices import float64, widest_dtype
from stackctl.engine.evaluation.scoring import record_losses
from stackctl.engine.loss.logits import supervised_token_losses
from stackctl.engine.models import evaluating
from stackctl.engine.training.distributed import numbers_of_each, share_of
from stackctl.engine.training.objectives import OBJECTIVES, AnswerBatch, Strength, ranked, rounding_of


@dataclass(frozen=True)
class Scores:
    """The losses (nats), the margins and their ranks of a micro-batch, each (P,): of its pairs, or for KTO of its
    answers.

    ``ranks`` are as :func:`stackctl.engine.training.objectives.ranked` gives them; ``desired`` and ``avoided`` are the
    log-probabilities (nats) of the two kinds of answers.
    """

    losses: Tensor
    margins: Tensor
    ranks: Tensor
    desired: Tensor
    avoided: Tensor


@dataclass(slots=True)
class KnownExample(Example):
    """An example with its ``reference``, and for KTO the swapped one that goes with it."""

    reference: float = 0.0
    swapped: KnownExample | None = None


@dataclass(frozen=True)
class KnownAnswers(LazySequence[Example]):
    """Examples, their log-probabilities (nats) under the frozen stack, and for KTO the swapped ones with theirs.

    Where an objective compares with nothing, all log-probabilities are zero.
    """

    examples: Sequence[Example]
    references: Sequence[float]
    swapped: KnownAnswers | None = None

    def __len__(self) -> int:
        return len(self.examples)

    def _item(self, number: int) -> KnownExample:
        own, swapped = self.examples[number], self.swapped
        other = swapped._item(number) if swapped is not None else None
        return KnownExample(own.input_ids, own.labels, own.desired, self.references[number], other)


def collate_answers(rows: Sequence[list[Example]], *, drifts: bool = False) -> dict[str, Any]:
    """One micro-batch; of a place that stands empty, two tokens of which nothing is learned.

    Of N answers there are also ``references`` (N,) and ``desired`` (N,), and with ``drifts`` their swapped ones as a
    micro-batch of its own.
    """
    examples = [example for row in rows for example in row]
    answers = [example for example in examples if isinstance(example, KnownExample)]
    batch: dict[str, Any] = collate(examples or [Example([0, 0], [IGNORED] * 2)])
    batch["references"] = torch.tensor([answer.reference for answer in answers], dtype=widest_dtype())
    batch["desired"] = torch.tensor([answer.desired for answer in answers], dtype=torch.bool)
    if drifts:
        batch["swapped"] = collate_answers([[answer.swapped for answer in answers if answer.swapped]])
    return batch


def answer_scores(
    model: nn.Module, inputs: dict[str, Any], job: TrainJob, *, drift: Tensor | None, one_by_one: bool
) -> Scores:
    """Losses and margins of a micro-batch as :func:`collate_answers` makes it."""
    given, tokens = _summed(model, inputs, one_by_one=one_by_one)
    return scores_of(AnswerBatch(given, tokens, inputs["references"].to(given), inputs["desired"], drift), job)


def _summed(model: nn.Module, inputs: dict[str, Any], *, one_by_one: bool) -> tuple[Tensor, Tensor]:
    """The log-probability (nats) and the tokens of each answer of a micro-batch, each (N,)."""
    losses = supervised_token_losses(model, inputs, one_by_one=one_by_one).losses
    owners = (inputs["position_ids"][0] == 0).cumsum(0)[inputs["keep"]] - 1
    count = inputs["references"].numel()
    wide = losses.to(widest_dtype())  # of long answers the difference is small beside either sum
    summed = wide.new_zeros(count).index_add(0, owners, -wide)
    return summed, torch.bincount(owners, minlength=count).to(summed)


def drift_of(model: nn.Module, batches: Sequence[dict[str, Any]], *, one_by_one: bool) -> Tensor:
    """KTO's z over the micro-batches of a step, of all processes: how far the swapped answers are from the reference.

    The weights do not change inside a step, so that z is that of the step, however it is cut into micro-batches. It is
    measured without dropout, as the reference is; that draws nothing, which a resumed run would draw at another place.
    """
    device = next(model.parameters()).device
    own = [0.0, 0.0]
    with evaluating(model):
        for batch in batches:
            inputs = {key: value.to(device) for key, value in batch["swapped"].items()}
            given, _ = _summed(model, inputs, one_by_one=one_by_one)
            own[0] += float(float64(given - inputs["references"]).sum())
            own[1] += given.numel()
    total, count = numbers_of_each(own, device).sum(0).tolist()
    return torch.tensor(max(total / count, 0.0) if count else 0.0, device=device)


def scores_of(answers: AnswerBatch, job: TrainJob) -> Scores:
    """What an objective makes of answers."""
    objective, beta = OBJECTIVES[job.objective], job.effective_beta
    assert beta is not None, "objectives of answers have one"
    losses = objective.loss(answers, Strength(beta, job.label_smoothing, job.sft_weight))
    given = answers.given.detach()
    margins = objective.margin(answers, beta).detach()
    ranks = ranked(margins, rounding_of(answers, objective, beta))
    return Scores(losses, margins, ranks, given[answers.desired], given[~answers.desired])


def measure(model: nn.Module, known: KnownAnswers, job: TrainJob, at_once: AtOnce | None = None) -> dict[str, float]:
    """``eval_loss``, ``eval_accuracy`` and ``eval_margin`` of a model as it stands; each process reads its share."""
    device, size = next(model.parameters()).device, OBJECTIVES[job.objective].answers
    count = len(known.examples) // size
    places, real = share_of(count)
    numbers = [size * place + n for place in places for n in range(size)]
    drift = None
    if (swapped := known.swapped) is not None:
        losses = record_losses(model, [swapped.examples[n] for n in numbers], at_once)
        gaps = [-loss - swapped.references[n] for loss, n in zip(losses, numbers, strict=True)]
        total = float(numbers_of_each([math.fsum(gaps[:real])], device).sum())
        drift = torch.tensor(max(total / count, 0.0))
    examples = [known.examples[n] for n in numbers]
    given = -torch.tensor(record_losses(model, examples, at_once), dtype=torch.float64)
    references = torch.tensor([known.references[n] for n in numbers], dtype=torch.float64)
    tokens = torch.tensor([example.supervised for example in examples])
    desired = torch.tensor([example.desired for example in examples])
    scores = scores_of(AnswerBatch(given, tokens, references, desired, drift), job)
    own = [float(values[:real].double().sum()) for values in (scores.losses, scores.ranks, scores.margins)]
    means = (numbers_of_each(own, device).sum(0) / count).tolist()
    return dict(zip(("eval_loss", "eval_accuracy", "eval_margin"), means, strict=True))
