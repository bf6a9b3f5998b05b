"""How bad a stack is with some of its parts switched off: its loss on data, or a bad text in its answer.

Both are graded. The line between bad and good lies half-way between the stack as it is and the best of what is left
when a member, or all of them, is off, but never far from that: nonsense is nonsense, whether its loss is twenty or a
million. What is no finite number is bad.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from stackctl.core import NOISE
from stackctl.engine.data.examples import IGNORED, Example
from stackctl.engine.evaluation.scoring import DataSet, Score, Scoring, judge, mean_loss, score_examples
from stackctl.engine.generation import Sampling, generate
from stackctl.engine.generation.logprobs import NotFinite
from stackctl.engine.generation.reader import Generated
from stackctl.engine.generation.stopping import decode
from stackctl.engine.models import StackedModel
from stackctl.engine.records.prompt_files import Prompt
from stackctl.plan.bisection import Off, switch_off
from stackctl.plan.stack_plan import StackPlan

_WORSE = 3.0
"""Nats above the best loss from which on a loss is bad, however much worse the stack is."""
_CLEARLY = 0.05
"""Nats by which a loss is lower for more than noise, whatever so few records can prove."""
_UNLIKELY = -16.0
"""Log-probability of a token (nats) below which it is not written, however much less likely it is."""


class LossProbe:
    """Bad is a high loss; of several data sets the mean of their losses.

    ``describe`` says what a person would see of the stack with some parts off, and whether that is ``bad``.
    """

    by_text = False

    def __init__(self, stacked: StackedModel, plan: StackPlan, sets: Sequence[DataSet]) -> None:
        self._stacked, self._plan, self._scoring = stacked, plan, Scoring(stacked, sets)
        self._seen: dict[Off, list[Score]] = {}
        self._line = math.inf

    def score(self, off: Off) -> float:
        if off not in self._seen:
            self._stacked.use(switch_off(self._plan, off))
            self._seen[off] = self._scoring.measure()
        loss = mean_loss(self._seen[off])
        return loss if math.isfinite(loss) else math.inf

    def threshold(self, off: Off) -> float | None:
        """Better is what is more than noise, or a twentieth less perplexity."""
        stack, best = self.score(frozenset()), self.score(off)
        if not best < stack or (stack - best < _CLEARLY and self.p_value(off) > NOISE):
            return None
        self._line = best + min((stack - best) / 2, _WORSE)
        return self._line

    def p_value(self, off: Off) -> float:
        """How often chance alone would make a stack without these parts as different on these records."""
        if not (math.isfinite(self.score(frozenset())) and math.isfinite(self.score(off))):
            return 0.0
        return judge(self._seen[frozenset()], self._seen[off]).p_value

    def describe(self, off: Off) -> dict[str, Any]:
        loss = self.score(off)
        return {
            "loss": loss if math.isfinite(loss) else None,
            "bad": not loss < self._line,
            "p_value": self.p_value(off),
        }


class TextProbe:
    """Bad is an answer that holds a text.

    A person sees the greedy answer. In the search the text itself would be too fine a sign, for any part that is
    switched off gives other words: there it is how likely the text is where the stack as it is wrote it, which takes a
    single forward pass. ``by_text`` looks at answers instead.
    """

    def __init__(self, stacked: StackedModel, plan: StackPlan, prompt: Prompt, text: str, sampling: Sampling) -> None:
        self._stacked, self._plan, self._prompt, self._text = stacked, plan, prompt, text
        self._sampling = sampling
        self._answers: dict[Off, tuple[Generated, bool]] = {}
        answer, _ = self._answer(frozenset())
        self.by_text = text not in answer.text  # it is bad for its numbers, if at all
        self._example = None if self.by_text else _ending_in(stacked.tokenizer, answer, text)

    def score(self, off: Off) -> float:
        """The mean log-probability of the text's tokens; by the text, one where it is bad, else zero."""
        if self.by_text or self._example is None:
            return float(self.describe(off)["bad"])
        self._stacked.use(switch_off(self._plan, off))
        (score,) = score_examples(self._stacked.model, [self._example])
        mean = -score.loss / score.tokens
        return max(mean, _UNLIKELY) if math.isfinite(mean) else math.inf

    def threshold(self, off: Off) -> float | None:
        stack, best = self.score(frozenset()), self.score(off)
        return None if not best < stack else (stack + best) / 2 if math.isfinite(stack) else math.inf

    def describe(self, off: Off) -> dict[str, Any]:
        answer, finite = self._answer(off)
        return {"text": answer.text, "finite": finite, "bad": not finite or self._text in answer.text}

    def _answer(self, off: Off) -> tuple[Generated, bool]:
        """The answer, and whether all logits of it were finite numbers."""
        if off not in self._answers:
            self._stacked.use(switch_off(self._plan, off))
            try:
                (answer,) = generate(self._stacked, [self._prompt], self._sampling)
                self._answers[off] = answer, True
            except NotFinite:
                self._answers[off] = Generated(self._prompt, "", 0, 0, "", 0.0), False
        return self._answers[off]


Probe = LossProbe | TextProbe


def _ending_in(tokenizer: Any, answer: Generated, text: str) -> Example:
    """Prompt and answer up to the end of a text that is in it, of which the tokens of that text are looked at."""
    end = next(n for n in range(1, len(answer.ids) + 1) if text in decode(tokenizer, answer.ids[:n]))
    start = decode(tokenizer, answer.ids[:end]).index(text)
    begin = next(n for n in range(end) if len(decode(tokenizer, answer.ids[: n + 1])) > start)
    ids = [*answer.asked, *answer.ids[:end]]
    ignored = len(answer.asked) + begin
    return Example(ids, [IGNORED] * ignored + ids[ignored:])
