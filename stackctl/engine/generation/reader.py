"""What prompts are read with, and what answers them, whichever engine that is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from stackctl.core.schema import Base
from stackctl.engine.records import Prompt
from stackctl.plan.model import StackPlan

if TYPE_CHECKING:
    from stackctl.engine.generation.answering import Generated
    from stackctl.engine.generation.sampling import Sampling
    from stackctl.engine.generation.stopping import OnText


class Reader(Protocol):
    """A base with its tokenizer; ``generation_config`` is transformers', for the tokens that end an answer."""

    @property
    def base(self) -> Base: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def generation_config(self) -> Any: ...


class Answers(Reader, Protocol):
    """A base that answers with one stack at a time: :class:`stackctl.engine.models.StackedModel` by transformers, or
    another engine.

    ``precision`` says what it computes in; ``rounding_error`` is what folding lost of the stack that is in use.
    """

    @property
    def plan(self) -> StackPlan | None: ...
    @property
    def precision(self) -> str: ...
    @property
    def rounding_error(self) -> float: ...

    def use(self, plan: StackPlan, *, live: bool = False) -> None:
        """Answer with another stack from now on."""


class OtherEngine(Answers, Protocol):
    """An engine that is not transformers in this process, and takes token ids."""

    def answer_encoded(
        self,
        prompts: Sequence[Prompt],
        batch: Sequence[list[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        on_text: OnText | None,
    ) -> list[Generated]:
        """The answers to prompts, in order."""
