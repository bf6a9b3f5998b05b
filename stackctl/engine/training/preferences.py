"""Pairs in a run: the log-probabilities of the reference, and the losses and margins of a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from stackctl.core.errors import VerificationFailed
from stackctl.core.schema import TrainJob
from stackctl.engine.data import Example, Rows
from stackctl.engine.evaluation import record_losses
from stackctl.engine.logits import supervised_token_losses
from stackctl.engine.training.objectives import OBJECTIVES, Pairs, Strength
from stackctl.engine.training.proofs import new_adapter_off

_LOOKED_AT = 16
"""Answers of which it is looked at that the new adapter, at zero, changes nothing."""


@dataclass(frozen=True)
class PairScores:
    """The loss (nats) and the margin of each pair of a micro-batch, each (P,)."""

    losses: Tensor
    margins: Tensor


class ReferencedRows(Sequence[list[Example]]):
    """Rows of pairs whose examples know their log-probabilities (nats) under the reference."""

    def __init__(self, rows: Rows, references: Sequence[float]) -> None:
        self._rows, self._references = rows, references

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        first, second = self._rows[index]
        place = 2 * range(len(self))[index]
        return [
            replace(first, reference=self._references[place]),
            replace(second, reference=self._references[place + 1]),
        ]


def reference(
    model: PeftModel, examples: Sequence[Example], live: str | None, *, bfloat16: bool, at_zero: bool
) -> list[float]:
    """The log-probability (nats) of each answer under the frozen stack: the model with its new adapter off.

    Called before the first step. ``at_zero``: the new adapter has no effect yet, which is looked at.

    Raises:
        VerificationFailed: the adapter, at zero, changes a log-probability.
    """
    device = next(model.parameters()).device.type
    with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
        with new_adapter_off(model, live):
            found = [-loss for loss in record_losses(model, examples)]
        if not at_zero:
            return found
        first = [examples[number] for number in range(min(_LOOKED_AT, len(examples)))]
        if [-loss for loss in record_losses(model, first)] != found[: len(first)]:
            raise VerificationFailed(
                "the new adapter changes log-probabilities before its first step: the margins are not zero, "
                "and the reference is not the frozen stack"
            )
    return found


def pair_scores(model: nn.Module, inputs: dict[str, Any], job: TrainJob, *, one_by_one: bool) -> PairScores:
    """Losses and margins of a collated micro-batch in which chosen and rejected answers take turns.

    ``inputs`` as :func:`stackctl.engine.data.collate` makes them, and ``references`` (2P,).
    """
    losses = supervised_token_losses(model, inputs, one_by_one=one_by_one).losses
    owners = (inputs["position_ids"][0] == 0).cumsum(0)[inputs["keep"]] - 1
    count = inputs["references"].numel()
    summed = losses.new_zeros(count).index_add(0, owners, -losses).float().view(count // 2, 2)
    tokens = torch.bincount(owners, minlength=count).to(summed).view(count // 2, 2)
    known = inputs["references"].to(summed).view(count // 2, 2)
    pairs = Pairs(summed[:, 0], summed[:, 1], tokens[:, 0], tokens[:, 1], known[:, 0], known[:, 1])
    objective, beta = OBJECTIVES[job.objective], job.effective_beta
    assert beta is not None, "objectives of pairs have one"
    found = objective.loss(pairs, Strength(beta, job.label_smoothing))
    return PairScores(found, objective.margin(pairs, beta).detach())
