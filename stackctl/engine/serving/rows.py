"""A row of a running batch: how its tokens are chosen, and the weights of its stack."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stackctl.engine.generation.answering import Generated
from stackctl.engine.generation.sampling import processors
from stackctl.engine.serving.requests import Row
from stackctl.engine.serving.row_adapters import RowWeights


@dataclass(eq=False)
class BatchRow(Row):
    """``weights`` are the members' by digest; None where the stack has to be folded."""

    weights: RowWeights | None = None
    made: int = 0
    last: int = 0
    folded: Generated | None = None
    """The whole answer, of a stack that had to be folded."""
    _chosen: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._processors: Any = processors(self.sampling, [len(self.ids)], [self.seed])

    @property
    def new_tokens(self) -> int:
        return self.folded.new_tokens if self.folded else len(self.answer.ids)

    @property
    def text(self) -> str:
        return self.folded.text if self.folded else self.answer.text

    @property
    def stop(self) -> str:
        return self.folded.stop if self.folded else self.answer.stop

    def choose(self, logits: Tensor) -> None:
        """Take the next token by the logits (vocabulary) in float32."""
        if len(self._processors):
            seen = torch.tensor([[*self.ids, *self._chosen]], device=logits.device)
            logits = self._processors(seen, logits[None])[0]
        self.take(int(logits.argmax()))

    def take(self, token: int) -> None:
        """The next token; the answer is finished when it ends it, or is the last that may follow."""
        self.last = token
        self._chosen.append(token)
        self.made += 1
        self.answer.add(token)
        if self.made >= self.limit:
            self.answer.finish()
