"""The log-probabilities of answers under the frozen stack, computed before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel

from stackctl.core.errors import VerificationFailed
from stackctl.core.schema import TrainJob
from stackctl.engine.data import Example
from stackctl.engine.evaluation import record_losses
from stackctl.engine.training.objectives import OBJECTIVES
from stackctl.engine.training.preferences import KnownAnswers
from stackctl.engine.training.proofs import new_adapter_off
from stackctl.engine.training.swapped_answers import SwappedAnswers

_LOOKED_AT = 16
"""Answers of which it is looked at that the new adapter, at zero, changes nothing."""


@dataclass(frozen=True)
class Reference:
    """A model whose frozen stack is the reference: it is what is left with the new adapter off.

    ``live`` is the frozen stack's name in it, where it is not folded. ``at_zero``: the new adapter has no effect yet.
    """

    model: PeftModel
    live: str | None
    at_zero: bool

    def know(self, examples: Sequence[Example], job: TrainJob, max_length: int, *, bfloat16: bool) -> KnownAnswers:
        """What an objective has to know of answers beforehand.

        Raises:
            VerificationFailed: the new adapter, at zero, changes a log-probability.
        """
        if not OBJECTIVES[job.objective].compares:
            return KnownAnswers(examples, [0.0] * len(examples))
        given = self._log_probabilities(examples, bfloat16)
        if job.objective != "kto":
            return KnownAnswers(examples, given)
        swapped = SwappedAnswers(examples, max_length)
        return KnownAnswers(examples, given, swapped, self._log_probabilities(swapped, bfloat16))

    def _log_probabilities(self, examples: Sequence[Example], bfloat16: bool) -> list[float]:
        """The log-probability (nats) of each answer under the frozen stack."""
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            with new_adapter_off(self.model, self.live):
                found = [-loss for loss in record_losses(self.model, examples)]
            if not self.at_zero:
                return found
            first = [examples[number] for number in range(min(_LOOKED_AT, len(examples)))]
            if [-loss for loss in record_losses(self.model, first)] != found[: len(first)]:
                raise VerificationFailed(
                    "the new adapter changes log-probabilities before its first step: the margins are not zero, "
                    "and the reference is not the frozen stack"
                )
        return found
