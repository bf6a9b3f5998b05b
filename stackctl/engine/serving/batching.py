"""A batch that runs on while answers begin and end in it: one thread, one base, any stacks.

transformers' continuous batching keeps its own paged cache and its own attention, and takes no adapter a row; here the
rows of a batch are told apart by :mod:`stackctl.engine.serving.row_adapters`. A stack that is no plain sum waits until
the batch is empty, is folded, and answers alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from stackctl.engine.generation.batch import AnswerRow, Batch
from stackctl.engine.generation.logprobs import TokenBytes
from stackctl.engine.generation.padded_kv_cache import PaddedKVCache, can_batch
from stackctl.engine.generation.plain_decoder import plain_decoder
from stackctl.engine.generation.shared_prefixes import FinishedTexts
from stackctl.engine.generation.transformers_answers import write_answers
from stackctl.engine.models import StackedModel, evaluating
from stackctl.engine.serving.requests import Engine, Limits, Row
from stackctl.engine.serving.row_adapters import RowAdapters, RowWeights, row_weights
from stackctl.machine import openmp
from stackctl.plan.stack_plan import StackPlan

_BASE: RowWeights = {}


@dataclass(eq=False)
class BatchRow(AnswerRow, Row):
    """``weights`` are the members' by digest; None where the stack has to be folded."""

    weights: RowWeights | None = None


class BatchingEngine(Engine[BatchRow]):
    """Answers by transformers in this process: different stacks in one batch."""

    row = BatchRow

    def __init__(self, stacked: StackedModel, limits: Limits | None = None) -> None:
        super().__init__(stacked, limits or Limits())
        self._stacked = stacked
        self._adapters = RowAdapters(stacked.model, self.limits.adapters)
        self._spell = TokenBytes(stacked.tokenizer)
        self._batches = can_batch(stacked)
        self._batch: Batch[BatchRow] | None = None
        self._finished = FinishedTexts(self.limits.rows)
        openmp.give_up_pool()  # loading is done; from here on one thread computes
        self._thread.start()

    @property
    def resident(self) -> tuple[str, ...]:
        """The digests of the adapters in memory."""
        return self._adapters.resident

    # -- from any thread ----------------------------------------------------------------------------------------

    def equip(self, plan: StackPlan, rows: Sequence[BatchRow]) -> None:
        weights = row_weights(plan) if self._batches and self._adapters.carries(plan) else None
        for row in rows:
            row.weights, row.spell = weights, self._spell

    def warm(self, plans: Sequence[StackPlan]) -> None:
        for plan in plans if self._batches else ():
            if self._adapters.carries(plan):
                self._adapters.load(plan, ())
        openmp.give_up_pool()

    # -- the engine's own thread --------------------------------------------------------------------------------

    def run(self) -> None:
        with evaluating(self._stacked.model):
            while self._wait():
                self._drop()
                self._admit()
                if self._rows:
                    self._step()
        self._stopped(self._rows)

    @property
    def _rows(self) -> list[BatchRow]:
        return self._batch.rows if self._batch else []

    def _wait(self) -> bool:
        with self._changed:
            if self._batch and not (self._waiting or self._rows):
                self._batch.release()
            self._changed.wait_for(lambda: self._closed or self._waiting or self._rows)
            return not self._closed

    def _next(self, joining: int) -> BatchRow | None:
        """The row at the head of the queue, if it may begin now, beside so many that are about to; one that has to be
        folded waits for an empty batch."""
        with self._changed:
            while self._waiting:
                head, running = self._waiting[0], len(self._rows) + joining
                if head.cancelled.is_set():
                    self._waiting.popleft().end(None)
                elif running >= self.limits.rows or (head.weights is None and running):
                    return None
                else:
                    return self._waiting.popleft()
        return None

    def _admit(self) -> None:
        """Let rows begin, their prompts read together."""
        joining: list[BatchRow] = []
        while (row := self._next(len(joining))) is not None:
            try:
                if row.weights is None:
                    self._answer_folded(row)
                else:
                    in_use = {digest for other in (*self._rows, *joining) for digest in other.weights or ()}
                    self._adapters.load(row.plan, in_use)
                    joining.append(row)
            except Exception as error:
                row.end(error)
        for group in self._running().together(joining) if joining else ():
            try:
                self._running().join(group)
            except Exception as error:
                for row in group:
                    row.end(error)
        self._drop()

    def _answer_folded(self, row: BatchRow) -> None:
        self._batch = None  # it computes with the weights that the model has now
        self._adapters.set_rows([])
        if self._stacked.plan is not row.plan:
            self._stacked.use(row.plan)
        self._stacked.tokenizer.chat_template = row.template
        sampling = replace(row.sampling, max_new_tokens=row.limit)
        write_answers([(row.answer, row.ids, row.seed)], self._stacked, sampling)
        row.end(None)

    def _running(self) -> Batch[BatchRow]:
        """The batch, on the base alone."""
        if self._batch is None:
            if self._stacked.plan is not None:
                self._stacked.restore()
            decoder = plain_decoder(self._stacked)
            kept = decoder.rows(self.limits.rows) if decoder else PaddedKVCache(self._stacked.model)
            self._batch = Batch(kept, self._weigh, self._finished)
        return self._batch

    def _weigh(self, rows: Sequence[BatchRow], tokens: Sequence[int]) -> None:
        self._adapters.set_rows([row.weights or _BASE for row in rows], tokens)

    def _step(self) -> None:
        """One more token for every row."""
        try:
            self._running().step()
        except Exception as error:
            for row in self._rows:
                row.end(error)
            self._batch = None
        self._drop()

    def _drop(self) -> None:
        """Rows that are finished, or that nobody waits for, leave."""
        for row in self._batch.leave() if self._batch else ():
            row.end(row.failed)
