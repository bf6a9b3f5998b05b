"""Answers to many prompts by a plain decoder: rows that are finished leave, and the next prompts take their places.

Prompts of like length are read together, each beginning in the first column: what pads a shorter one comes behind it,
where attention from left to right does not see it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from stackctl.engine.generation.drafts import Drafts
from stackctl.engine.generation.logits_processors import are_numbers, choose_token, processors
from stackctl.engine.generation.logprobs import TokenBytes, not_finite
from stackctl.engine.generation.plain_decoder import PlainDecoder
from stackctl.engine.generation.prefix_cache import PrefixCache
from stackctl.engine.generation.sampling import Sampling
from stackctl.engine.generation.stopping import Answer
from stackctl.engine.models import StackedModel, evaluating
from stackctl.machine.resources import main_memory

_READ_AT_ONCE = 4096
"""Tokens of prompts that go through the model in one call, a longer prompt apart."""
_ROWS = 32
"""From here on a step takes twice as long for twice as many rows."""


@dataclass(eq=False)
class AnswerRow:
    """An answer in the making, see :class:`ChoosingRow`; ``seconds`` are those from reading the prompt to the end."""

    answer: Answer
    ids: list[int]
    limit: int
    sampling: Sampling
    processors: Any
    spell: TokenBytes | None
    drafts: Drafts
    chosen: list[int] = field(default_factory=list)
    started: float = 0.0
    seconds: float = 0.0

    @property
    def is_finished(self) -> bool:
        return bool(self.answer.stop) or self.answer.is_left()


class RunningAnswers:
    """Answers rows with the stack that a model holds, as many at once as there are ``places``.

    A ``prefix_cache``, with what was computed of an earlier prompt, is for a single row.
    """

    def __init__(
        self,
        stacked: StackedModel,
        decoder: PlainDecoder,
        sampling: Sampling,
        places: int,
        prefix_cache: PrefixCache | None = None,
    ) -> None:
        self._stacked, self._sampling, self._places, self._prefix_cache = stacked, sampling, places, prefix_cache
        self._cache: DynamicCache | None = None
        self._batch, self._checks_drafts = decoder.rows(places), decoder.checks_drafts
        self._rows: list[AnswerRow] = []
        self._waiting: deque[AnswerRow] = deque()
        self._spell = TokenBytes(stacked.tokenizer) if sampling.top_logprobs is not None else None

    def add(self, answer: Answer, ids: list[int], seed: int) -> AnswerRow:
        """Queue a prompt."""
        context, most = self._stacked.base.context_length, self._sampling.max_new_tokens
        limit = min(most, context - len(ids)) if context else most
        chooses = processors(self._sampling, [len(ids)], [seed])
        row = AnswerRow(answer, ids, limit, self._sampling, chooses, self._spell, Drafts(ids))
        self._waiting.append(row)
        return row

    def finished(self) -> Iterator[AnswerRow]:
        """Every row as it is finished."""
        while self._rows or self._waiting:
            with evaluating(self._stacked.model), torch.inference_mode():
                done = self._go_on()
            yield from done

    def _go_on(self) -> list[AnswerRow]:
        """Until some rows are finished, which leave."""
        try:
            while not any(row.is_finished for row in self._rows):
                if self._waiting and self._places - len(self._rows) >= max(1, self._places // 4):
                    self._admit()
                else:
                    self._step()
        finally:
            self._keep()
        done = []
        for number in reversed(range(len(self._rows))):
            if self._rows[number].is_finished:
                done.append(self._leave(number))
        return done[::-1]

    def _admit(self) -> None:
        """Read prompts into the free places, those of like length together."""
        free = self._places - len(self._rows)
        new = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
        for group in _alike(sorted(new, key=lambda row: len(row.ids))):
            started = time.perf_counter()
            for row in group:
                row.started = started
            if self._prefix_cache:
                self._cache = self._prefix_cache.begin(self._stacked, group[0].ids)
            logits = self._batch.join([row.ids for row in group], self._cache)
            self._rows += group
            self._choose(group, logits[:, None], [[] for _ in group])

    def _step(self) -> None:
        """The next token of every row; of a single one as many as its drafts have right."""
        guesses: list[list[int]] = [[] for _ in self._rows]
        if len(self._rows) == 1 and self._checks_drafts:
            [row] = self._rows
            guesses = [row.drafts.guess(row.limit - len(row.chosen) - 1)]
        tokens = [[row.chosen[-1], *own] for row, own in zip(self._rows, guesses, strict=True)]
        self._choose(self._rows, self._batch.step(tokens), guesses)

    def _choose(self, rows: Sequence[AnswerRow], logits: Tensor, guesses: Sequence[Sequence[int]]) -> None:
        """The next token of each row by its logits (rows, tokens, vocabulary), and those behind it for as long as each
        is what was guessed: then the logits behind the guess are those behind the text.

        Raises:
            Incompatible: the logits that a token is chosen by are no numbers.
        """
        finite, likeliest = are_numbers(logits).tolist(), logits.argmax(-1).tolist()
        for number, (row, drafted) in enumerate(zip(rows, guesses, strict=True)):
            begun = len(row.chosen)
            for place, guess in enumerate([*drafted, None]):
                if not finite[number][place]:
                    raise not_finite()
                choose_token(row, logits[number, place], likeliest[number][place])
                if row.is_finished or row.chosen[-1] != guess:
                    break
                self._batch.keep(number)
            row.drafts.checked(len(drafted), row.chosen[begun:])

    def _keep(self) -> None:
        """Remember what went through the model of the single row."""
        if self._prefix_cache and self._rows and self._cache is not None:
            [row] = self._rows
            self._prefix_cache.keep([*row.ids, *row.chosen][: self._batch.hand_over(self._cache)])
        elif self._prefix_cache:
            self._prefix_cache.keep([])

    def _leave(self, number: int) -> AnswerRow:
        row = self._rows[number]
        self._batch.leave(number)
        last = self._rows.pop()
        if last is not row:
            self._rows[number] = last
        row.answer.finish()
        row.seconds = time.perf_counter() - row.started
        return row


def places_for(decoder: PlainDecoder, tokens: int) -> int:
    """How many rows of so many tokens, with their answers, to answer at once: where more are hardly quicker, or fewer
    where their keys and values would take more than a quarter of the free memory."""
    fitting = main_memory().available // 4 // (tokens * decoder.bytes_of_token)
    return max(1, min(_ROWS, fitting))


def _alike(rows: Sequence[AnswerRow]) -> Iterator[list[AnswerRow]]:
    """Rows, the shortest prompts first, in groups that are read at once: none has much to be padded."""
    group: list[AnswerRow] = []
    for row in rows:
        length = len(row.ids)
        if group and (length > len(group[0].ids) * 5 // 4 + 8 or length * (len(group) + 1) > _READ_AT_ONCE):
            yield group
            group = []
        group.append(row)
    if group:
        yield group
