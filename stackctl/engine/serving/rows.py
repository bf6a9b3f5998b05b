"""A row of a running batch: how its tokens are chosen, and the weights of its stack."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from stackctl.engine.generation.logits_processors import check_numbers, choose_token, processors
from stackctl.engine.generation.logprobs import TokenBytes
from stackctl.engine.serving.requests import Row
from stackctl.engine.serving.row_adapters import RowWeights


@dataclass(eq=False)
class BatchRow(Row):
    """``weights`` are the members' by digest; None where the stack has to be folded."""

    weights: RowWeights | None = None
    spell: TokenBytes | None = None
    failed: Exception | None = None
    chosen: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.processors: Any = processors(self.sampling, [len(self.ids)], [self.seed])

    @property
    def made(self) -> int:
        return len(self.chosen)

    @property
    def is_finished(self) -> bool:
        return bool(self.answer.stop or self.failed or self.cancelled.is_set())

    def choose(self, logits: Tensor) -> None:
        """Take the next token by the logits (vocabulary) in float32.

        Raises:
            Incompatible: they are no numbers.
        """
        check_numbers(logits)
        choose_token(self, logits, int(logits.argmax()))
