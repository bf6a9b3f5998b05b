"""A row of a running batch: how its tokens are chosen, and the weights of its stack."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stackctl.engine.generation.logits_processors import check_numbers, processors, token_logprob
from stackctl.engine.generation.logprobs import TokenBytes, TokenLogprob
from stackctl.engine.serving.requests import Row
from stackctl.engine.serving.row_adapters import RowWeights


@dataclass(eq=False)
class BatchRow(Row):
    """``weights`` are the members' by digest; None where the stack has to be folded."""

    weights: RowWeights | None = None
    spell: TokenBytes | None = None
    failed: Exception | None = None
    made: int = 0
    last: int = 0
    _chosen: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._processors: Any = processors(self.sampling, [len(self.ids)], [self.seed])

    @property
    def is_finished(self) -> bool:
        return bool(self.answer.stop or self.failed or self.cancelled.is_set())

    def choose(self, logits: Tensor) -> None:
        """Take the next token by the logits (vocabulary) in float32; the answer is finished when it ends it, or is the
        last that may follow.

        Raises:
            Incompatible: they are no numbers.
        """
        check_numbers(logits)
        scores = logits
        if len(self._processors):
            seen = torch.tensor([[*self.ids, *self._chosen]], device=logits.device)
            scores = self._processors(seen, logits[None])[0]
        self.last = int(scores.argmax())
        self._chosen.append(self.last)
        self.made += 1
        self.answer.add(self.last, self._likely(logits))
        if self.made >= self.limit:
            self.answer.finish()

    def _likely(self, logits: Tensor) -> TokenLogprob | None:
        count = self.sampling.top_logprobs
        if count is None or self.spell is None:
            return None
        return token_logprob(logits, self.last, count, self.spell, first=not self.answer.ids)
