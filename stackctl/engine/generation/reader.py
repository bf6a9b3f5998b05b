"""What prompts are read with, what answers them, and an answer, whichever engine that is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from stackctl.core.schema import Base
from stackctl.engine.records.prompt_files import Prompt
from stackctl.plan.stack_plan import StackPlan


class Reader(Protocol):
    """A base with its tokenizer; ``generation_config`` is transformers', for the tokens that end an answer."""

    @property
    def base(self) -> Base: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def generation_config(self) -> Any: ...


@dataclass
class PlainReader:
    """A base's tokenizer without its weights."""

    base: Base
    tokenizer: Any
    generation_config: Any = None


class AnswerEngine(Reader, Protocol):
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


@dataclass(frozen=True)
class Generated:
    """One answer. ``stop`` says why it ended: ``end`` (of turn or text), ``stop`` (a stop text) or ``length``.

    ``asked`` and ``ids`` are the tokens of the prompt, as the model read it, and those that it wrote.
    """

    prompt: Prompt
    text: str
    prompt_tokens: int
    new_tokens: int
    stop: str
    seconds: float
    asked: tuple[int, ...] = ()
    ids: tuple[int, ...] = ()

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds if self.seconds else 0.0
