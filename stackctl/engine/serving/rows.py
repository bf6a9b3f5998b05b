"""A row of a running batch: how its tokens are chosen, and the weights of its stack."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from stackctl.engine.generation.logits_processors import processors
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
