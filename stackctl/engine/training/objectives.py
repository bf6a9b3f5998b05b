"""What training on answers makes small: objectives as pure functions of log-probabilities.

They take :class:`AnswerBatch` and a :class:`Strength` and return losses in nats: those of pairs (P,), one for a pair,
KTO (N,), one for an answer. Adding one takes a function and a line of :data:`OBJECTIVES`. Written below: c and r are
the log-probabilities of the chosen and of the rejected answer, c' and r' those under the frozen stack, |c| and |r|
their tokens, s the logistic function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

SIMPO_MARGIN = 0.5
"""SimPO's gamma: what the margin should be above zero (TRL's default)."""
_ROUNDING = 2.0**-20
"""The share of a log-probability that two ways to compute it in float32 may differ by."""
_CERTAIN = 2.0**-24
"""The smallest -log p of an answer: float32 tells no p above from one, whose odds would be infinite."""


@dataclass(frozen=True)
class AnswerBatch:
    """Log-probabilities of N answers, (N,), summed over the answer's tokens in float64 where there is one, and what
    belongs to them.

    ``tokens`` (N,) counts those tokens; ``reference`` (N,) are the log-probabilities under the frozen stack alone;
    ``desired`` (N,) tells the answers that are to become likelier. ``drift`` (scalar, nats) is how far the model is
    from the reference on answers that do not belong to their prompts, never below zero; KTO alone looks at it.
    Of P pairs the chosen and the rejected answers take turns.
    """

    given: Tensor
    tokens: Tensor
    reference: Tensor
    desired: Tensor
    drift: Tensor | None = None

    @property
    def gains(self) -> Tensor:
        """How much likelier than under the reference each is, (N,)."""
        return self.given - self.reference

    @property
    def means(self) -> Tensor:
        """Log-probabilities per token, (N,)."""
        return self.given / self.tokens


@dataclass(frozen=True)
class Strength:
    """``beta`` as each objective means it; ``label_smoothing``: the share of pairs that are taken to be the wrong way
    round; ``sft_weight``: what the chosen answer's own loss counts besides."""

    beta: float
    label_smoothing: float = 0.0
    sft_weight: float = 0.0


def _gaps(values: Tensor) -> Tensor:
    """Of values of answers (N,) those of the chosen less those of the rejected, (P,)."""
    return values[::2] - values[1::2]


def dpo(pairs: AnswerBatch, strength: Strength) -> Tensor:
    """DPO (https://arxiv.org/abs/2305.18290): -(1 - e) log s(beta h) - e log s(-beta h), h = (c - c') - (r - r').

    e is the label smoothing of conservative DPO (https://ericmitchell.ai/cdpo.pdf).
    """
    h, e = strength.beta * _gaps(pairs.gains), strength.label_smoothing
    return -(1 - e) * logsigmoid(h) - e * logsigmoid(-h)


def ipo(pairs: AnswerBatch, strength: Strength) -> Tensor:
    """IPO (https://arxiv.org/abs/2310.12036, equation 17): ((c - c')/|c| - (r - r')/|r| - 1/(2 beta))^2.

    With means over tokens, as its authors recommend and TRL computes it.
    """
    return (_gaps(pairs.gains / pairs.tokens) - 1 / (2 * strength.beta)) ** 2


def orpo(pairs: AnswerBatch, strength: Strength) -> Tensor:
    """ORPO (https://arxiv.org/abs/2403.07691, equations 6 and 7): -c/|c| - beta log s(log odds(c) - log odds(r)).

    log odds(x) = x/|x| - log(1 - exp(x/|x|)). Without a reference; the chosen answer's own loss is part of it.
    An answer that is certain is taken to be as good as certain.
    """
    means = pairs.means.clamp(max=-_CERTAIN)
    return own_loss(pairs) - strength.beta * logsigmoid(_gaps(means - torch.log(-torch.expm1(means))))


def simpo(pairs: AnswerBatch, strength: Strength) -> Tensor:
    """SimPO (https://arxiv.org/abs/2405.14734, equation 6): -log s(beta (c/|c| - r/|r|) - gamma), without a reference.

    gamma is :data:`SIMPO_MARGIN`.
    """
    return -logsigmoid(strength.beta * _gaps(pairs.means) - SIMPO_MARGIN)


def own_loss(pairs: AnswerBatch) -> Tensor:
    """The chosen answer's own loss, -c/|c| (P,); RPO adds it to DPO (https://arxiv.org/abs/2404.19733, equation 1)."""
    return -pairs.means[::2]


def kto(answers: AnswerBatch, strength: Strength) -> Tensor:
    """KTO (https://arxiv.org/abs/2402.01306, equation 8), losses (N,): 1 - s(beta (a - a' - z)) of a desired answer a.

    Of one that is to be avoided 1 - s(beta (z - (a - a'))). z is the drift, of which no gradient is taken; both kinds
    of answers weigh the same.
    """
    return 1 - torch.sigmoid(_side(answers, strength.beta))


def _side(answers: AnswerBatch, beta: float) -> Tensor:
    """By how much each answer is on its side of the drift, (N,): above it if desired, below it if not."""
    assert answers.drift is not None, "KTO measures it"
    above = answers.gains - answers.drift
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
    loss: Callable[[AnswerBatch, Strength], Tensor], compared: Callable[[AnswerBatch], Tensor], *, compares: bool
) -> Objective:
    """``compared`` are the values of answers whose gaps the margins are."""

    def with_own_loss(answers: AnswerBatch, strength: Strength) -> Tensor:
        losses = loss(answers, strength)
        return losses + strength.sft_weight * own_loss(answers) if strength.sft_weight else losses

    return Objective(with_own_loss, lambda answers, beta: beta * _gaps(compared(answers)), compares)


OBJECTIVES = {
    "dpo": _of_pairs(dpo, lambda pairs: pairs.gains, compares=True),
    "ipo": _of_pairs(ipo, lambda pairs: pairs.gains, compares=True),
    "kto": Objective(kto, _side, compares=True, answers=1),
    "orpo": _of_pairs(orpo, lambda pairs: pairs.means, compares=False),
    "simpo": _of_pairs(simpo, lambda pairs: pairs.means, compares=False),
}


def ranked(margins: Tensor, rounding: Tensor | float = 0.0) -> Tensor:
    """1 where a pair is ranked rightly, 0 where wrongly, and one half where both answers are equally likely, (P,).

    A margin of at most ``rounding`` is none.
    """
    return torch.where(margins.abs() <= rounding, 0.5, (margins > 0).float())


def rounding_of(answers: AnswerBatch, objective: Objective, beta: float) -> Tensor | float:
    """The margins (P,) that rounding alone makes of answers that are as likely as under the reference.

    Those were scored in other rows, of which float32 has other last places.
    """
    if not objective.compares:
        return 0.0
    return beta * _ROUNDING * answers.given.detach().abs().view(-1, objective.answers).sum(1)
