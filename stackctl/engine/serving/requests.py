"""What every engine of the server does alike: requests become rows, which wait in one queue, and end once."""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from stackctl.core.errors import Incompatible, StackctlError, Usage
from stackctl.engine.data.chat_template import choose_chat_template
from stackctl.engine.generation.prompts import encode_prompts
from stackctl.engine.generation.reader import PlainReader, Reader
from stackctl.engine.generation.sampling import Sampling, row_seeds
from stackctl.engine.generation.stopping import Answer, Endings, endings_of
from stackctl.engine.records.prompt_files import Prompt
from stackctl.plan.stack_plan import StackPlan

_UNKNOWN_CONTEXT = 1 << 20
"""Tokens that a prompt may have on a base that says nothing of its context."""


class QueueFull(StackctlError):
    """More answers wait than may wait."""

    code = "queue_full"


class FieldRefused(Incompatible):
    """What one field of a request asks for, this engine cannot give."""

    def __init__(self, message: str, *, hint: str = "", param: str = "") -> None:
        super().__init__(message, hint=hint)
        self.param = param


@dataclass(frozen=True)
class Limits:
    """``rows`` that are answered at once, rows that may ``wait``, ``adapters`` kept in memory when unused."""

    rows: int = 16
    wait: int = 64
    adapters: int = 32


@dataclass(eq=False)
class Row:
    """One answer in the making. ``ids`` are the prompt's tokens, ``limit`` the most that may follow, ``template`` the
    chat template in use.

    ``on_end`` is called once, from the engine's thread, with the error that ended it or None.
    """

    plan: StackPlan
    prompt: Prompt
    sampling: Sampling
    ids: list[int]
    limit: int
    seed: int
    template: str | None
    answer: Answer
    on_text: Callable[[str], object] | None = None
    on_end: Callable[[Any, Exception | None], object] = lambda row, error: None
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def new_tokens(self) -> int:
        return len(self.answer.ids)

    @property
    def text(self) -> str:
        return self.answer.text

    @property
    def stop(self) -> str:
        """``end``, ``stop`` or ``length``; empty while it is not finished."""
        return self.answer.stop

    def speak(self, text: str) -> None:
        """Hand on more of its text."""
        if self.on_text:
            self.on_text(text)

    def end(self, error: Exception | None) -> None:
        """Tell whoever waits that it is finished."""
        with contextlib.suppress(Exception):  # whoever waits may be gone
            self.on_end(self, error)


AnyRow = TypeVar("AnyRow", bound=Row)


class Engine(ABC, Generic[AnyRow]):
    """Answers of any stacks on one base; thread-safe but for :meth:`run`, which is its own thread's.

    ``decodes``: whether it is given tokens and decodes them; else its text comes in pieces.
    """

    row: type[AnyRow]
    decodes = True

    def __init__(self, reader: Reader, limits: Limits) -> None:
        self.limits = limits
        self._base = reader.base
        self._tokenizer = reader.tokenizer if self.decodes else None
        self._encoder = PlainReader(reader.base, copy.deepcopy(reader.tokenizer), reader.generation_config)
        self._template = reader.tokenizer.chat_template
        self._encoding = threading.Lock()
        self._waiting: deque[AnyRow] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self.run, name="engine", daemon=True)

    @functools.cached_property
    def _longest_token(self) -> int:
        """In characters."""
        return max(map(len, self._encoder.tokenizer.get_vocab()))

    # -- from any thread ----------------------------------------------------------------------------------------

    def prepare(
        self, plan: StackPlan, prompts: Sequence[Prompt], sampling: Sampling, *, copies: int = 1, streams: bool = False
    ) -> list[AnyRow]:
        """Rows for prompts, ``copies`` of each one after another, ready to be submitted.

        Raises:
            Usage, Incompatible: a prompt is empty, does not fit, or the stack has problems.
        """
        plan.check()
        for prompt in prompts:
            self._check_size(prompt)
        if (count := len(prompts) * copies) > self.limits.wait:
            raise Usage(f"the request asks for {count} answers, and {self.limits.wait} may wait", hint="ask for fewer")
        asked = [prompt for prompt in prompts for _ in range(copies)]
        with self._encoding:
            tokenizer = self._encoder.tokenizer
            tokenizer.chat_template = self._template
            choose_chat_template(tokenizer, self._base.name, plan, raw=sampling.raw)
            encoded = [ids for ids in encode_prompts(self._encoder, prompts, sampling) for _ in range(copies)]
            endings = endings_of(self._encoder, sampling)
        seeds = row_seeds(sampling.seed, map(tuple, encoded))
        rows = [
            self._new_row((plan, prompt, sampling), ids, seed, endings, streams)
            for prompt, ids, seed in zip(asked, encoded, seeds, strict=True)
        ]
        self.equip(plan, rows)
        return rows

    def _check_size(self, prompt: Prompt) -> None:
        """Refuse what is beyond the context whatever its tokens are, before minutes go into finding them.

        Raises:
            Usage: there are more characters than the longest tokens can hold, or more messages than tokens.
        """
        limit = self._base.context_length or _UNKNOWN_CONTEXT
        messages = prompt.messages or []
        characters = sum(len(message["content"]) for message in messages) if messages else len(prompt.text)
        if characters > limit * self._longest_token or len(messages) > limit:
            size = f"{len(messages):,} messages" if len(messages) > limit else f"{characters:,} characters"
            name = self._base.name
            raise Usage(f"{prompt.place} has {size}, and {name} reads {limit:,} tokens at once", hint="shorten it")

    def _new_row(
        self, asked: tuple[StackPlan, Prompt, Sampling], ids: list[int], seed: int, endings: Endings, streams: bool
    ) -> AnyRow:
        plan, prompt, sampling = asked
        context = self._base.context_length
        limit = min(sampling.max_new_tokens, context - len(ids)) if context else sampling.max_new_tokens

        def answer(speak: Callable[[str], object] | None) -> Answer:
            return Answer(self._tokenizer, endings, speak)

        row = self.row(plan, prompt, sampling, ids, limit, seed, endings.template, answer(None))
        if streams or sampling.top_logprobs is not None:
            row.answer = answer(row.speak)
        row.answer.is_left = row.cancelled.is_set
        return row

    @abstractmethod
    def equip(self, plan: StackPlan, rows: Sequence[AnyRow]) -> None:
        """Give the rows of a request what this engine needs to answer them.

        Raises:
            StackctlError: it cannot answer with this stack.
        """

    def submit(self, rows: Sequence[AnyRow]) -> None:
        """Queue rows; all of them, or none.

        Raises:
            QueueFull: too many wait.
        """
        with self._changed:
            waiting = sum(not row.cancelled.is_set() for row in self._waiting)
            if waiting + len(rows) > self.limits.wait or self._closed:
                raise QueueFull(f"{waiting} answers are waiting, and {self.limits.wait} may", hint="ask again later")
            self._waiting.extend(rows)
            self._changed.notify()

    @abstractmethod
    def warm(self, plans: Sequence[StackPlan]) -> None:
        """Have the adapters of stacks ready before anything is asked; only while nothing runs."""

    def close(self) -> None:
        """Stop after the step that runs now, and wait for it; what is unfinished ends with an error."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    # -- the engine's own thread --------------------------------------------------------------------------------

    @abstractmethod
    def run(self) -> None:
        """Answer what is submitted until it is closed."""

    def _stopped(self, running: Sequence[AnyRow] = ()) -> None:
        """End what nobody will answer any more."""
        for row in [*running, *self._waiting]:
            row.end(StackctlError("the server is stopping"))
