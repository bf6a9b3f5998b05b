"""A batch that runs on while answers begin and end in it: one thread, one base, any stacks.

transformers' continuous batching keeps its own paged cache and its own attention, and takes no adapter a row; here the
rows of a left-padded batch are told apart by :mod:`stackctl.engine.serving.row_adapters`. A stack that is no plain sum
waits until the batch is empty, is folded, and answers alone.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import DynamicCache

from stackctl.core.errors import StackctlError, Usage
from stackctl.engine.data import adopt_chat_template, ensure_chat_template
from stackctl.engine.generation.answering import answer_encoded
from stackctl.engine.generation.prompts import encode_prompts
from stackctl.engine.generation.sampling import Sampling, row_seeds
from stackctl.engine.generation.stopping import Answer, end_tokens, turn_text
from stackctl.engine.models import StackedModel, evaluating
from stackctl.engine.records import Prompt
from stackctl.engine.serving.row_adapters import RowAdapters, row_weights
from stackctl.engine.serving.row_cache import RowCache, can_batch
from stackctl.engine.serving.rows import Row
from stackctl.plan.model import StackPlan

_UNKNOWN_CONTEXT = 1 << 20
"""Tokens that a prompt may have on a base that says nothing of its context."""


class QueueFull(StackctlError):
    """More answers wait than may wait."""

    code = "queue_full"


class _Left(Exception):
    """Nobody waits for this answer any more."""


@dataclass(frozen=True)
class Limits:
    """``rows`` that are answered at once, rows that may ``wait``, ``adapters`` kept in memory when unused."""

    rows: int = 16
    wait: int = 64
    adapters: int = 32


class Engine:
    """Answers of any stacks on one base; thread-safe but for :meth:`run`, which is its own thread's."""

    def __init__(self, stacked: StackedModel, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._stacked = stacked
        self._encoder = replace(stacked, tokenizer=copy.deepcopy(stacked.tokenizer))
        self._template = stacked.tokenizer.chat_template
        self._adapters = RowAdapters(stacked.model, self.limits.adapters)
        self._batches = can_batch(stacked)
        self._keeps_one = "logits_to_keep" in inspect.signature(stacked.model.forward).parameters
        self._longest_token = max(map(len, stacked.tokenizer.get_vocab()))
        self._waiting: deque[Row] = deque()
        self._rows: list[Row] = []
        self._cache = RowCache()
        self._changed = threading.Condition()
        self._encoding = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self._thread.start()

    @property
    def resident(self) -> tuple[str, ...]:
        """The digests of the adapters in memory."""
        return self._adapters.resident

    # -- from any thread ----------------------------------------------------------------------------------------

    def prepare(
        self, plan: StackPlan, prompts: Sequence[Prompt], sampling: Sampling, *, copies: int = 1, streams: bool = False
    ) -> list[Row]:
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
            adopt_chat_template(tokenizer, self._encoder.base.name, [plan])
            if not sampling.raw:
                ensure_chat_template(tokenizer)
            encoded = [ids for ids in encode_prompts(self._encoder, prompts, sampling) for _ in range(copies)]
            template = tokenizer.chat_template
            ends, turn = end_tokens(self._encoder), "" if sampling.raw else turn_text(self._encoder)
        weights = row_weights(plan) if self._batches and self._adapters.carries(plan) else None
        context = self._stacked.base.context_length
        rows = []
        for prompt, ids, seed in zip(asked, encoded, row_seeds(sampling.seed, map(tuple, encoded)), strict=True):
            limit = min(sampling.max_new_tokens, context - len(ids)) if context else sampling.max_new_tokens
            row = Row(
                plan, prompt, sampling, ids, limit, seed, template,
                Answer(self._stacked.tokenizer, ends, sampling.stop, turn, None), weights,
            )  # fmt: skip
            if streams:
                row.answer = Answer(self._stacked.tokenizer, ends, sampling.stop, turn, _spoken(row))
            rows.append(row)
        return rows

    def _check_size(self, prompt: Prompt) -> None:
        """Refuse what is beyond the context whatever its tokens are, before minutes go into finding them.

        Raises:
            Usage: there are more characters than the longest tokens can hold, or more messages than tokens.
        """
        limit = self._stacked.base.context_length or _UNKNOWN_CONTEXT
        messages = prompt.messages or []
        characters = sum(len(message["content"]) for message in messages) if messages else len(prompt.text)
        if characters > limit * self._longest_token or len(messages) > limit:
            size = f"{len(messages):,} messages" if len(messages) > limit else f"{characters:,} characters"
            name = self._stacked.base.name
            raise Usage(f"{prompt.place} has {size}, and {name} reads {limit:,} tokens at once", hint="shorten it")

    def submit(self, rows: Sequence[Row]) -> None:
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

    def warm(self, plan: StackPlan) -> None:
        """Have a stack's adapters in memory before anything is asked; only while nothing runs."""
        if self._batches and self._adapters.carries(plan):
            self._adapters.load(plan, ())

    def close(self) -> None:
        """Stop after the step that runs now, and wait for it; what is unfinished ends with an error."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    # -- the engine's own thread --------------------------------------------------------------------------------

    def run(self) -> None:
        with evaluating(self._stacked.model):
            while self._wait():
                self._drop()
                self._admit()
                if self._rows:
                    self._step()
        closed = StackctlError("the server is stopping")
        for row in [*self._rows, *self._waiting]:
            _end(row, closed)

    def _wait(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting or self._rows)
            return not self._closed

    def _next(self) -> Row | None:
        """The row at the head of the queue, if it may begin now; one that has to be folded waits for an empty batch."""
        with self._changed:
            while self._waiting:
                head = self._waiting[0]
                if head.cancelled.is_set():
                    _end(self._waiting.popleft(), None)
                elif len(self._rows) >= self.limits.rows or (head.weights is None and self._rows):
                    return None
                else:
                    return self._waiting.popleft()
        return None

    def _admit(self) -> None:
        while (row := self._next()) is not None:
            try:
                if row.weights is None:
                    self._answer_folded(row)
                else:
                    self._join(row)
            except _Left:
                _end(row, None)
            except Exception as error:
                _end(row, error)

    def _answer_folded(self, row: Row) -> None:
        self._adapters.set_rows([])
        if self._stacked.plan is not row.plan:
            self._stacked.use(row.plan)
        self._stacked.tokenizer.chat_template = row.template
        sampling = replace(row.sampling, max_new_tokens=row.limit)
        speak = _spoken(row)

        def on_text(text: str) -> None:
            if row.cancelled.is_set():
                raise _Left
            speak(text)

        found = answer_encoded([row.prompt], [row.ids], [row.seed], self._stacked, sampling, on_text, None)[0]
        row.folded = found
        _end(row, None)

    def _join(self, row: Row) -> None:
        if self._stacked.plan is not None:
            self._stacked.restore()
        assert row.weights is not None
        in_use = {digest for other in self._rows for digest in other.weights or ()}
        self._adapters.load(row.plan, in_use)
        self._adapters.set_rows([row.weights])
        cache = DynamicCache()
        ids = torch.tensor([row.ids], device=self._stacked.device)
        positions = torch.arange(len(row.ids), device=self._stacked.device)[None]
        logits = self._forward(ids, torch.ones_like(ids), positions, cache, first=True)
        row.choose(logits[0])
        if row.answer.stop:
            _end(row, None)
            return
        self._cache.join(cache, len(row.ids))
        self._rows.append(row)

    def _step(self) -> None:
        """One more token for every row."""
        try:
            self._adapters.set_rows([row.weights or {} for row in self._rows])
            cache, mask, positions = self._cache.open(self._stacked.device)
            ids = torch.tensor([[row.last] for row in self._rows], device=self._stacked.device)
            logits = self._forward(ids, mask, positions, cache)
            self._cache.close(cache)
            for row, own in zip(self._rows, logits, strict=True):
                row.choose(own)
        except Exception as error:
            for row in self._rows:
                _end(row, error)
            self._rows, self._cache = [], RowCache()
            return
        self._drop()

    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: DynamicCache, first: bool = False
    ) -> torch.Tensor:
        keep = {"logits_to_keep": 1} if first and self._keeps_one else {}
        made = self._stacked.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, **keep
        )
        logits: torch.Tensor = made.logits[:, -1].float()
        return logits

    def _drop(self) -> None:
        """Rows that are finished, or that nobody waits for, leave."""
        staying = [n for n, row in enumerate(self._rows) if not row.answer.stop and not row.cancelled.is_set()]
        if len(staying) == len(self._rows):
            return
        for number, row in enumerate(self._rows):
            if number not in staying:
                _end(row, None)
        self._cache.keep(staying)
        self._rows = [self._rows[n] for n in staying]


def _spoken(row: Row) -> Callable[[str], Any]:
    def speak(text: str) -> None:
        if row.on_text:
            row.on_text(text)

    return speak


def _end(row: Row, error: Exception | None) -> None:
    with contextlib.suppress(Exception):  # whoever waits may be gone
        row.on_end(row, error)
