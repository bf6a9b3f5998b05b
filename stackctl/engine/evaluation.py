"""Loss and perplexity on supervised tokens, of a model as it stands."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from stackctl.engine.data import Example, collate
from stackctl.engine.models import evaluating
from stackctl.engine.trainer import supervised_logits

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Score:
    """Mean cross-entropy (nats) over supervised tokens."""

    loss: float
    tokens: int
    records: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


def record_losses(model: torch.nn.Module, examples: Sequence[Example], progress: Progress | None = None) -> list[float]:
    """Summed cross-entropy (nats) of each record's supervised tokens, each record alone in its row.

    One record at a time: no padding, no mask and no neighbour, so that a number does not depend on the batch.
    """
    device = next(model.parameters()).device
    losses = []
    with evaluating(model):
        for example in examples:
            batch = {key: value.to(device) for key, value in collate([example]).items()}
            logits = supervised_logits(model, batch).float()
            losses.append(float(functional.cross_entropy(logits, batch["labels"], reduction="sum").double()))
            if progress:
                progress(1)
    return losses


def supervised_count(examples: Sequence[Example]) -> int:
    """How many tokens of some examples have a label that a model can predict."""
    return sum(sum(label != -100 for label in example.labels[1:]) for example in examples)


def score_examples(model: torch.nn.Module, examples: Sequence[Example], progress: Progress | None = None) -> Score:
    """Mean cross-entropy (nats) over the supervised tokens of some examples."""
    losses = record_losses(model, examples, progress)
    tokens = supervised_count(examples)
    return Score(math.fsum(losses) / max(tokens, 1), tokens, len(examples))
