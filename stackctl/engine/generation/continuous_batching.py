"""Answers to many prompts by a plain decoder: rows that are finished leave, and the next prompts take their places.

Prompts are read together, one behind another.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator

from stackctl.engine.generation.batch import AnswerRow, Batch
from stackctl.engine.generation.logprobs import TokenBytes
from stackctl.engine.generation.plain_decoder import PlainDecoder
from stackctl.engine.generation.sampling import Sampling
from stackctl.engine.generation.shared_prefixes import FinishedTexts
from stackctl.engine.generation.stopping import Answer
from stackctl.engine.models import StackedModel, evaluating
from stackctl.machine.resources import main_memory

_ROWS = 32
"""From here on a step takes twice as long for twice as many rows."""


class ContinuousBatching:
    """Answers rows with the stack that a model holds, as many at once as there are ``places``.

    ``finished`` has what was computed of earlier prompts, and keeps what is computed of these.
    """

    def __init__(
        self,
        stacked: StackedModel,
        decoder: PlainDecoder,
        sampling: Sampling,
        places: int,
        finished: FinishedTexts | None = None,
    ) -> None:
        self._stacked, self._sampling, self._places = stacked, sampling, places
        self._batch: Batch[AnswerRow] = Batch(decoder.rows(places), finished=finished)
        self._waiting: deque[AnswerRow] = deque()
        self._spell = TokenBytes(stacked.tokenizer) if sampling.top_logprobs is not None else None

    def add(self, answer: Answer, ids: list[int], seed: int) -> AnswerRow:
        """Queue a prompt."""
        context, most = self._stacked.base.context_length, self._sampling.max_new_tokens
        limit = min(most, context - len(ids)) if context else most
        row = AnswerRow(answer, ids, limit, self._sampling, seed, self._stacked.plan, self._spell)
        self._waiting.append(row)
        return row

    def finished(self) -> Iterator[AnswerRow]:
        """Every row as it is finished.

        Raises:
            Incompatible: the logits that a token is chosen by are no numbers.
        """
        while self._batch.rows or self._waiting:
            with evaluating(self._stacked.model):
                done = self._go_on()
            for row in done:
                if row.failed:
                    raise row.failed
                row.answer.finish()
                row.seconds = time.perf_counter() - row.started
            yield from done

    def _go_on(self) -> list[AnswerRow]:
        """Until some rows are finished, which leave."""
        try:
            while not any(row.is_finished for row in self._batch.rows):
                if self._waiting and self._places - len(self._batch.rows) >= max(1, self._places // 4):
                    self._admit()
                else:
                    self._batch.step()
        except KeyboardInterrupt:  # what is computed by now is gone on from, too
            self._batch.keep_alone()
            raise
        return self._batch.leave()

    def _admit(self) -> None:
        """Read prompts into the free places."""
        free = self._places - len(self._batch.rows)
        for group in self._batch.together([self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]):
            started = time.perf_counter()
            for row in group:
                row.started = started
            self._batch.join(group)


def places_for(decoder: PlainDecoder, tokens: int) -> int:
    """How many rows of so many tokens, with their answers, to answer at once: where more are hardly quicker, or fewer
    where their keys and values would take more than a quarter of the free memory."""
    fitting = main_memory().available // 4 // (tokens * decoder.bytes_of_token)
    return max(1, min(_ROWS, fitting))
