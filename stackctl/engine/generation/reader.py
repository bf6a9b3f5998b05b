"""What prompts are read with, and what answers them, whichever engine that is."""

from __future__ import annotations

from typing import Any, Protocol

from stackctl.core.schema import Base
from stackctl.plan.model import StackPlan


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
