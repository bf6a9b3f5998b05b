"""What training on answers makes small: objectives as pure functions of log-probabilities.

Those of pairs take :class:`PairBatch` and a :class:`Strength` and return losses (P,) in nats, one for a pair; KTO takes
:class:`AnswerBatch`, of which each has a label, and returns a loss for each. Adding one takes a function and a line of
:data:`OBJECTIVES`. Written below: c and r are the log-probabilities of the chosen and of the rejected answer, c' and r'
those under the frozen stack, |c| and |r| their tokens, s the logistic function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

SIMPO_MARGIN = 0.5
"""SimPO's gamma: what the margin should be above zero (TRL's default)."""


@dataclass(frozen=True)
class PairBatch:
    """Log-probabilities of both answers of P pairs, each (P,), float32, summed over the answer's tokens.

    ``*_tokens`` (P,) count those tokens; ``*_reference`` (P,) are the log-probabilities under the frozen stack alone.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    chosen_reference: Tensor
    rejected_reference: Tensor


@dataclass(frozen=True)
class AnswerBatch:
    """Log-probabilities of N answers, (N,), float32, summed over the answer's tokens, and what belongs to them.

    ``tokens`` (N,) counts those tokens; ``reference`` (N,) are the log-probabilities under the frozen stack alone;
    ``desired`` (N,) tells the answers that are to become likelier. ``drift`` (scalar, nats) is how far the model is
    from the reference on answers that do not belong to their prompts, never below zero; KTO alone looks at it.
    """

    given: Tensor
    tokens: Tensor
    reference: Tensor
    desired: Tensor
    drift: Tensor | None = None

    @property
    def pairs(self) -> PairBatch:
        """Where chosen and rejected answers take turns."""
        return PairBatch(*(t[n::2] for t in (self.given, self.tokens, self.reference) for n in (0, 1)))


@dataclass(frozen=True)
class Strength:
    """``beta`` as each objective means it; ``label_smoothing``: the share of pairs that are taken to be the wrong way
    round; ``sft_weight``: what the chosen answer's own loss counts besides."""

    beta: float
    label_smoothing: float = 0.0
    sft_weight: float = 0.0


def _log_ratio(pairs: PairBatch) -> Tensor:
    """How much more than the reference a model prefers the chosen answer, (P,): (c - c') - (r - r')."""
    return (pairs.chosen - pairs.chosen_reference) - (pairs.rejected - pairs.rejected_reference)


def dpo(pairs: PairBatch, strength: Strength) -> Tensor:
    """DPO (https://arxiv.org/abs/2305.18290): -(1 - e) log s(beta h) - e log s(-beta h), h = (c - c') - (r - r').

    e is the label smoothing of conservative DPO (https://ericmitchell.ai/cdpo.pdf).
    """
    h, e = strength.beta * _log_ratio(pairs), strength.label_smoothing
    return -(1 - e) * logsigmoid(h) - e * logsigmoid(-h)


def ipo(pairs: PairBatch, strength: Strength) -> Tensor:
    """IPO (https://arxiv.org/abs/2310.12036, equation 17): ((c - c')/|c| - (r - r')/|r| - 1/(2 beta))^2.

    With means over tokens, as its authors recommend and TRL computes it.
    """
    chosen = (pairs.chosen - pairs.chosen_reference) / pairs.chosen_tokens
    rejected = (pairs.rejected - pairs.rejected_reference) / pairs.rejected_tokens
    return (chosen - rejected - 1 / (2 * strength.beta)) ** 2


def orpo(pairs: PairBatch, strength: Strength) -> Tensor:
    """ORPO (https://arxiv.org/abs/2403.07691, equations 6 and 7): -c/|c| - beta log s(log odds(c) - log odds(r)).

    log odds(x) = x/|x| - log(1 - exp(x/|x|)). Without a reference; the chosen answer's own loss is part of it.
    """
    chosen, rejected = _means(pairs)
    odds = (chosen - rejected) - (torch.log1p(-torch.exp(chosen)) - torch.log1p(-torch.exp(rejected)))
    return own_loss(pairs) - strength.beta * logsigmoid(odds)


def simpo(pairs: PairBatch, strength: Strength) -> Tensor:
    """SimPO (https://arxiv.org/abs/2405.14734, equation 6): -log s(beta (c/|c| - r/|r|) - gamma), without a reference.

    gamma is :data:`SIMPO_MARGIN`.
    """
    chosen, rejected = _means(pairs)
    return -logsigmoid(strength.beta * (chosen - rejected) - SIMPO_MARGIN)


def own_loss(pairs: PairBatch) -> Tensor:
    """The chosen answer's own loss, -c/|c| (P,); RPO adds it to DPO (https://arxiv.org/abs/2404.19733, equation 1)."""
    return -_means(pairs)[0]


def kto(answers: AnswerBatch, strength: Strength) -> Tensor:
    """KTO (https://arxiv.org/abs/2402.01306, equation 8), losses (N,): 1 - s(beta (a - a' - z)) of a desired answer a.

    Of one that is to be avoided 1 - s(beta (z - (a - a'))). z is the drift, of which no gradient is taken; both kinds
    of answers weigh the same.
    """
    return 1 - torch.sigmoid(_side(answers, strength.beta))


def _means(pairs: PairBatch) -> tuple[Tensor, Tensor]:
    """Log-probabilities per token, each (P,)."""
    return pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens


def _reward_margin(pairs: PairBatch, beta: float) -> Tensor:
    return beta * _log_ratio(pairs)


def _mean_margin(pairs: PairBatch, beta: float) -> Tensor:
    chosen, rejected = _means(pairs)
    return beta * (chosen - rejected)


def _side(answers: AnswerBatch, beta: float) -> Tensor:
    """By how much each answer is on its side of the drift, (N,): above it if desired, below it if not."""
    assert answers.drift is not None, "KTO measures it"
    above = answers.given - answers.reference - answers.drift
    return beta * torch.where(answers.desired, above, -above)


@dataclass(frozen=True)
class Objective:
    """A loss, the margin by which it ranks rightly, whether both look at the reference, and whether they are of pairs.

    A margin of a pair is by how much the chosen answer comes first; of a single answer by how much it is on its side.
    """

    loss: Callable[[AnswerBatch, Strength], Tensor]
    margin: Callable[[AnswerBatch, float], Tensor]
    compares: bool
    answers: int = 2
    """How many answers a loss is of."""


def _of_pairs(
    loss: Callable[[PairBatch, Strength], Tensor], margin: Callable[[PairBatch, float], Tensor], *, compares: bool
) -> Objective:
    def with_own_loss(answers: AnswerBatch, strength: Strength) -> Tensor:
        losses = loss(answers.pairs, strength)
        return losses + strength.sft_weight * own_loss(answers.pairs) if strength.sft_weight else losses

    return Objective(with_own_loss, lambda answers, beta: margin(answers.pairs, beta), compares)


OBJECTIVES = {
    "dpo": _of_pairs(dpo, _reward_margin, compares=True),
    "ipo": _of_pairs(ipo, _reward_margin, compares=True),
    "kto": Objective(kto, _side, compares=True, answers=1),
    "orpo": _of_pairs(orpo, _mean_margin, compares=False),
    "simpo": _of_pairs(simpo, _mean_margin, compares=False),
}


def ranked(margins: Tensor) -> Tensor:
    """1 where a pair is ranked rightly, 0 where wrongly, and one half where both answers are equally likely, (P,)."""
    return ((margins.sign() + 1) / 2).float()
