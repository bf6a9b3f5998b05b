"""Answers that are written together, one more token of each in a step: rows join, and leave when they are finished."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from stackctl.engine.generation.drafts import Drafts
from stackctl.engine.generation.logits_processors import are_numbers, processors, token_logprob
from stackctl.engine.generation.logprobs import TokenBytes, not_finite
from stackctl.engine.generation.sampling import Sampling
from stackctl.engine.generation.shared_prefixes import FinishedTexts, Prefix, Text, shared_prefixes
from stackctl.engine.generation.stopping import Answer

_READ_AT_ONCE = 4096
"""Tokens of prompts that go through the model in one call, a longer prompt apart."""


class BatchCache(Protocol):
    """Keys and values of a batch, and the model that reads and goes on from them: ``KVCache`` of a decoder of ours,
    ``PaddedKVCache`` of transformers'. ``mode`` is what the computing is done in; ``pads``: prompts that are read
    together are padded; ``draft_costs`` see :class:`Drafts`, none where a step takes one token."""

    draft_costs: Mapping[int, float]
    pads: bool

    @property
    def mode(self) -> Callable[[], contextlib.AbstractContextManager[object]]: ...
    def join(
        self, prompts: Sequence[Sequence[int]], prefixes: Sequence[Prefix] = (), finished: Sequence[Tensor] = ()
    ) -> Tensor: ...
    def text(self, row: int) -> Tensor: ...
    def order(self) -> Sequence[int]: ...
    def step(self, tokens: Sequence[Sequence[int]]) -> Tensor: ...
    def keep(self, row: int) -> None: ...
    def leave(self, row: int, failed: bool = False) -> None: ...
    def prepare(self, steps: int) -> None: ...
    def release(self) -> None: ...


@dataclass(eq=False)
class AnswerRow:
    """An answer in the making: the prompt's ids, the most tokens that may follow, those ``chosen`` so far, and the
    error that ended it.

    Rows of equal ``weights`` are computed alike; ``spell`` is there where somebody asks how likely the tokens were, and
    ``seconds`` are those from reading the prompt to the end.
    """

    answer: Answer
    ids: list[int]
    limit: int
    sampling: Sampling
    seed: int
    weights: Any = None
    spell: TokenBytes | None = None
    chosen: list[int] = field(default_factory=list)
    failed: Exception | None = None
    started: float = 0.0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.processors: Any = processors(self.sampling, [len(self.ids)], [self.seed])

    @property
    def is_finished(self) -> bool:
        return bool(self.answer.stop or self.failed) or self.answer.is_left()

    def choose(self, logits: Tensor, likeliest: int) -> None:
        """Take the next token by its logits (vocabulary) in float32, of which ``likeliest`` is the largest's place.

        The answer is finished when the token ends it, or is the last that may follow.
        """
        token = likeliest
        if len(self.processors):
            seen = torch.tensor([[*self.ids, *self.chosen]], device=logits.device)
            token = int(self.processors(seen, logits[None])[0].argmax())
        self.chosen.append(token)
        likely, count = None, self.sampling.top_logprobs
        if count is not None and self.spell is not None:
            likely = token_logprob(logits, token, count, self.spell, first=not self.answer.ids)
        self.answer.add(token, likely)
        if len(self.chosen) >= self.limit:
            self.answer.finish()


AnyRow = TypeVar("AnyRow", bound=AnswerRow)


class Batch(Generic[AnyRow]):
    """``before`` is told the rows of each pass of the model before it is made, and how many tokens of each it sees one
    behind another; none are told where it is as many of each. ``finished`` keeps what may be gone on from."""

    def __init__(
        self,
        kept: BatchCache,
        before: Callable[[Sequence[AnyRow], Sequence[int]], object] = lambda rows, tokens: None,
        finished: FinishedTexts | None = None,
    ) -> None:
        self._kept, self._before = kept, before
        self._finished = finished or FinishedTexts(0)
        self._guessed: AnyRow | None = None
        self._drafts = Drafts((), {})
        self.rows: list[AnyRow] = []

    def join(self, rows: Sequence[AnyRow]) -> None:
        """Read prompts together, see :meth:`together`, and choose the first token of each answer. What they share with
        one another, with rows that are written, and with finished texts is computed once."""
        prompts = [row.ids for row in rows]
        with self._kept.mode():
            prefixes = [] if self._kept.pads else self._prefixes(rows)
            known = {one.prompt: one.tokens for one in prefixes}
            new = [len(ids) - known.get(number, 0) for number, ids in enumerate(prompts)]
            self._before(rows, () if self._kept.pads or len(rows) == 1 else new)
            logits = self._kept.join(prompts, prefixes, self._finished.seen)
            self._finished.use({one.source - len(self.rows) for one in prefixes})
            self.rows += rows
            self._choose(rows, logits[:, None], [[] for _ in rows])

    def together(self, rows: Sequence[AnyRow]) -> Iterator[list[AnyRow]]:
        """Rows in groups that are read at once, the shortest prompts first; where they are padded, none has much."""
        group: list[AnyRow] = []
        tokens = 0
        for row in sorted(rows, key=lambda row: len(row.ids)):
            length = len(row.ids)
            tokens = length * (len(group) + 1) if self._kept.pads else tokens + length
            far = self._kept.pads and group and length > len(group[0].ids) * 5 // 4 + 8
            if group and (far or tokens > _READ_AT_ONCE):
                yield group
                group, tokens = [], length
            group.append(row)
        if group:
            yield group

    def step(self) -> None:
        """The next token of every row; of a single one as many as its drafts have right."""
        with self._kept.mode():
            self._kept.prepare(max(row.limit - len(row.chosen) for row in self.rows))
            self.rows = [self.rows[number] for number in self._kept.order()]
            self._before(self.rows, ())
            if len(self.rows) == 1 and self._kept.draft_costs:
                self._step_ahead(self.rows[0])
            else:
                self._guessed = None
                logits = self._kept.step([[row.chosen[-1]] for row in self.rows])
                self._choose(self.rows, logits, [[] for _ in self.rows])

    def _step_ahead(self, row: AnyRow) -> None:
        """The next tokens of the only row. What is guessed from is made when a row has become the only one."""
        if self._guessed is not row:
            self._guessed, self._drafts = row, Drafts(row.ids, self._kept.draft_costs)
            for token in row.chosen:
                self._drafts.checked(0, [token])
        begun, guesses = len(row.chosen), self._drafts.guess(row.limit - len(row.chosen) - 1)
        self._choose([row], self._kept.step([[row.chosen[-1], *guesses]]), [guesses])
        self._drafts.checked(len(guesses), row.chosen[begun:])

    def leave(self) -> list[AnyRow]:
        """Rows that are finished leave; in their order."""
        done = []
        with self._kept.mode():
            for number in reversed(range(len(self.rows))):
                row = self.rows[number]
                if row.is_finished:
                    done.append(row)
                    self._keep(number)
                    self._kept.leave(number, row.failed is not None)
                    last = self.rows.pop()
                    if last is not row:
                        self.rows[number] = last
        return done[::-1]

    def keep_alone(self) -> None:
        """The only row is given up: what is computed of it by now may be gone on from."""
        if len(self.rows) == 1:
            self._keep(0)

    def _keep(self, number: int) -> None:
        row = self.rows[number]
        if self._finished.most and not row.failed and not self._kept.pads:
            self._finished.add(_written(row), self._kept.text(number))

    def release(self) -> None:
        """Nothing is about to join the empty batch: give its memory back."""
        self._kept.release()
        self._guessed, self._drafts = None, Drafts((), {})

    def _prefixes(self, rows: Sequence[AnyRow]) -> list[Prefix]:
        prompts = [Text(row.ids, row.weights) for row in rows]
        return shared_prefixes(prompts, [*map(_written, self.rows), *self._finished.texts])

    def _choose(self, rows: Sequence[AnyRow], logits: Tensor, guesses: Sequence[Sequence[int]]) -> None:
        """The next token of each row by its logits (rows, tokens, vocabulary), and those behind it for as long as each
        is what was guessed: then the logits behind the guess are those behind the text. What goes wrong ends its row.
        """
        finite, likeliest = are_numbers(logits).tolist(), logits.argmax(-1).tolist()
        for number, (row, drafted) in enumerate(zip(rows, guesses, strict=True)):
            try:
                for place, guess in enumerate([*drafted, None]):
                    if not finite[number][place]:
                        raise not_finite()
                    row.choose(logits[number, place], likeliest[number][place])
                    if row.is_finished or row.chosen[-1] != guess:
                        break
                    self._kept.keep(number)
            except Exception as error:
                row.failed = error


def _written(row: AnyRow) -> Text:
    """What went through the model of a row: not the token that was chosen last."""
    return Text([*row.ids, *row.chosen[:-1]], row.weights)
