"""A batch that runs on while answers begin and end in it: one thread, one base, any stacks.

transformers' continuous batching keeps its own paged cache and its own attention, and takes no adapter a row; here the
rows of a left-padded batch are told apart by :mod:`stackctl.engine.serving.row_adapters`. A stack that is no plain sum
waits until the batch is empty, is folded, and answers alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import DynamicCache

from stackctl.engine.generation.answering import write_answers
from stackctl.engine.generation.logprobs import TokenBytes
from stackctl.engine.models import StackedModel, evaluating
from stackctl.engine.serving.requests import Engine, Limits
from stackctl.engine.serving.row_adapters import RowAdapters, row_weights
from stackctl.engine.serving.row_cache import RowCache, can_batch
from stackctl.engine.serving.rows import BatchRow
from stackctl.plan.model import StackPlan


class BatchingEngine(Engine[BatchRow]):
    """Answers by transformers in this process: different stacks in one batch."""

    row = BatchRow

    def __init__(self, stacked: StackedModel, limits: Limits | None = None) -> None:
        super().__init__(stacked, limits or Limits())
        self._stacked = stacked
        self._adapters = RowAdapters(stacked.model, self.limits.adapters)
        self._spell = TokenBytes(stacked.tokenizer)
        self._batches = can_batch(stacked)
        self._keeps_one = "logits_to_keep" in inspect.signature(stacked.model.forward).parameters
        self._rows: list[BatchRow] = []
        self._cache = RowCache()
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

    # -- the engine's own thread --------------------------------------------------------------------------------

    def run(self) -> None:
        with evaluating(self._stacked.model):
            while self._wait():
                self._drop()
                self._admit()
                if self._rows:
                    self._step()
        self._stopped(self._rows)

    def _wait(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting or self._rows)
            return not self._closed

    def _next(self) -> BatchRow | None:
        """The row at the head of the queue, if it may begin now; one that has to be folded waits for an empty batch."""
        with self._changed:
            while self._waiting:
                head = self._waiting[0]
                if head.cancelled.is_set():
                    self._waiting.popleft().end(None)
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
            except Exception as error:
                row.end(error)

    def _answer_folded(self, row: BatchRow) -> None:
        self._adapters.set_rows([])
        if self._stacked.plan is not row.plan:
            self._stacked.use(row.plan)
        self._stacked.tokenizer.chat_template = row.template
        sampling = replace(row.sampling, max_new_tokens=row.limit)
        write_answers([row.answer], [row.ids], [row.seed], self._stacked, sampling)
        row.end(None)

    def _join(self, row: BatchRow) -> None:
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
            row.end(None)
            return
        self._cache.join(cache, len(row.ids))
        self._rows.append(row)

    def _step(self) -> None:
        """One more token for every row."""
        try:
            self._adapters.set_rows([row.weights or {} for row in self._rows])
            cache, mask, positions = self._cache.open(self._stacked.device)
            ids = torch.tensor([[row.chosen[-1]] for row in self._rows], device=self._stacked.device)
            logits = self._forward(ids, mask, positions, cache)
            self._cache.close(cache)
            for row, own in zip(self._rows, logits, strict=True):
                try:
                    row.choose(own)
                except Exception as error:  # of this row, and no other
                    row.failed = error
        except Exception as error:
            for row in self._rows:
                row.end(error)
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
        staying = [n for n, row in enumerate(self._rows) if not row.is_finished]
        if len(staying) == len(self._rows):
            return
        for number, row in enumerate(self._rows):
            if number not in staying:
                row.end(row.failed)
        self._cache.keep(staying)
        self._rows = [self._rows[n] for n in staying]
