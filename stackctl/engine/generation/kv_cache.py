"""The keys and values of a batch whose rows join and leave, in memory that is made once."""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from stackctl.engine.generation.prefill import Copy, Prefill
from stackctl.engine.generation.shared_prefixes import Prefix

_MORE_COLUMNS = 128
_TOO_MANY = 4
"""Times as many columns as are needed, from which on memory is given back."""
_MOVED = 4
"""Columns that are attended to in the time in which one is moved."""


@dataclass(frozen=True)
class CacheShape:
    """What is kept of a token: keys and values of so many layers and heads, of a width, in a type."""

    layers: int
    heads: int
    width: int
    dtype: torch.dtype


class Attending(Protocol):
    """What a decoder's layers put keys and values into, and attend to; ``positions`` are those of the new tokens."""

    positions: Tensor

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor: ...


class Decoder(Protocol):
    """What computes the rows; ``groups`` is how many heads see one key, ``draft_costs`` what several tokens of
    a row in one step cost, see :class:`~stackctl.engine.generation.drafts.Drafts`."""

    draft_costs: Mapping[int, float]
    kept: CacheShape

    @property
    def groups(self) -> int: ...
    def read(self, tokens: Tensor, prompts: Prefill) -> Tensor: ...
    def step(self, tokens: Tensor, rows: KVCache) -> Tensor: ...
    def prepare(self, rows: int, steps: int) -> None: ...


@dataclass(frozen=True)
class _Together:
    """Rows that attend in one call. ``seen``: keys and values of each layer (rows, heads, columns, head width);
    ``mask`` (rows, 1, heads of a group · tokens, columns) is added: 0, or -inf; None where all of it is theirs."""

    seen: Sequence[Tensor]
    mask: Tensor | None


class KVCache:
    """Keys and values of rows that join and leave, up to so many ``places``, each from column 0 on.

    In a step every row has the same number of new ``tokens``; ``positions`` (rows · tokens) are their columns.
    """

    mode = torch.inference_mode
    pads = False

    def __init__(self, decoder: Decoder, places: int) -> None:
        self._decoder, self._places = decoder, places
        self.draft_costs = decoder.draft_costs
        self._lengths: list[int] = []
        self._memory = torch.empty(0, 2, 0, 0, 0, 0)  # (layers, 2, rows, heads, columns, head width)
        self._at: Tensor | None = None
        self._into: Sequence[Tensor] = ()
        self._counts: list[int] = []
        self._calls: list[_Together] = []
        self._loss, self._lost = 0, 0
        self.positions = torch.empty(0, dtype=torch.long)
        self.tokens = 1

    def join(
        self, prompts: Sequence[Sequence[int]], prefixes: Sequence[Prefix] = (), finished: Sequence[Tensor] = ()
    ) -> Tensor:
        """Add rows; returns the logits (rows, vocabulary) behind them. ``prefixes`` are shared with the rows that are
        here, with ``finished`` texts (layers, 2, heads, tokens, head width), or with one another."""
        first = len(self._lengths)
        self._make_room(first + len(prompts), max(map(len, prompts)))
        known, copies = [0] * len(prompts), []
        for one in prefixes:
            known[one.prompt] = one.tokens
            row, among_prompts = first + one.prompt, one.source - first - len(finished)
            if among_prompts >= 0:
                copies.append(Copy(row, first + among_prompts, one.tokens))
                continue
            seen = self._memory[:, :, one.source] if one.source < first else finished[one.source - first]
            self._memory[:, :, row, :, : one.tokens] = seen[:, :, :, : one.tokens]
        lengths = list(map(len, prompts))
        reading = Prefill(self._memory, first, list(zip(known, lengths, strict=True)), copies)
        ids = [token for prompt, begin in zip(prompts, known, strict=True) for token in prompt[begin:]]
        logits = self._decoder.read(torch.tensor(ids), reading)
        self._lengths += lengths
        self._counts = []
        return logits

    def step(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """One more token of every row, and guesses of those behind it, as many in each row; returns the logits
        (rows, tokens, vocabulary) behind them. Only the first is kept, and with :meth:`keep` those that were right."""
        self.tokens = len(tokens[0])
        self._make_room(len(tokens), max(self._lengths) + self.tokens)
        positions = torch.tensor(self._lengths)[:, None] + torch.arange(self.tokens)  # (rows, tokens)
        self.positions = positions.flatten()
        self._cut(positions)
        logits = self._decoder.step(torch.tensor(tokens).flatten(), self)
        self._lengths = [length + 1 for length in self._lengths]
        return logits.view(len(tokens), self.tokens, -1)

    def keep(self, row: int) -> None:
        """One more of the guesses of the last step belongs to a row's text."""
        self._lengths[row] += 1
        self._counts = []

    def order(self) -> Sequence[int]:
        """Before a step: put the rows in the order of their lengths, when what was attended to in vain since the last
        time costs as much as that; returns which row is now at each place."""
        self._group()
        self._lost += self._loss
        if self._lost <= _MOVED * sum(self._lengths):
            return range(len(self._lengths))
        order = sorted(range(len(self._lengths)), key=self._lengths.__getitem__)
        self._lengths = [self._lengths[row] for row in order]
        for layer in self._memory:
            layer[:, : len(order), :, : self._lengths[-1]] = layer[:, order, :, : self._lengths[-1]]
        self._counts, self._lost = [], 0
        return order

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Put keys and values (rows · tokens, heads, head width) behind each row; returns what the queries, of more
        heads, take from all that the layer has."""
        keys, values = 2 * layer, 2 * layer + 1
        for number, new in ((keys, key), (values, value)):
            if self._at is not None:
                self._into[number].index_copy_(0, self._at, new.reshape(-1, new.shape[-1]))
            elif self.tokens == 1:
                self._into[number].copy_(new)
            else:
                self._into[number].copy_(new.unflatten(0, (-1, self.tokens)).transpose(1, 2))
        # The heads of a group are the queries of their one key, those of all new tokens one after another.
        query = query.view(len(query), -1, self._decoder.groups, query.shape[-1])
        if self.tokens > 1:
            query = query.unflatten(0, (-1, self.tokens)).transpose(1, 2).flatten(2, 3)
        queries = query.split(self._counts) if len(self._calls) > 1 else [query]
        found = [
            functional.scaled_dot_product_attention(own, one.seen[keys], one.seen[values], one.mask, scale=scale)
            for own, one in zip(queries, self._calls, strict=True)
        ]
        seen = torch.cat(found) if len(found) > 1 else found[0]
        if self.tokens > 1:
            seen = seen.unflatten(2, (self.tokens, -1)).transpose(1, 2)
        return seen

    def leave(self, row: int, failed: bool = False) -> None:
        """A row leaves, and the last one takes its place. Of one that ``failed`` nothing may be left: where it is no
        number, no mask would hide it."""
        if failed:
            self._memory[:, :, row, :, : self._lengths[row] + self.tokens] = 0
        last = self._lengths.pop()
        if row < len(self._lengths):
            self._lengths[row] = last
            self._memory[:, :, row, :, :last] = self._memory[:, :, len(self._lengths), :, :last]
        self._counts = []

    def prepare(self, steps: int) -> None:
        """A step is made, and so many may still come."""
        self._decoder.prepare(len(self._lengths), steps)

    def text(self, row: int) -> Tensor:
        """A copy of a row's keys and values: (layers, 2, heads, tokens, head width)."""
        return self._memory[:, :, row, :, : self._lengths[row]].clone()

    def release(self) -> None:
        """No row is left, and none is about to come: give the memory back."""
        self._memory = self._memory.new_empty(0, 2, 0, 0, 0, 0)

    def _group(self) -> None:
        """Decide which rows attend together, if they are others than in the last step."""
        if not self._counts:
            width = self._memory.shape[3] * self._memory.shape[5]
            self._counts, cost = attention_groups(self._lengths, width)
            self._loss = cost - attention_groups(sorted(self._lengths), width)[1]

    def _cut(self, positions: Tensor) -> None:
        """Views of the memory for a step, made at once for all layers, keys and values of each: what is seen, and where
        the new ones go: (rows, heads, tokens, head width), without the tokens where there is one. Rows of unlike length
        go to places (rows · tokens · heads) of (all columns, head width).
        """
        self._group()
        count, heads, columns = len(positions), *self._memory.shape[3:5]
        both, first = self._memory.flatten(0, 1), 0
        self._calls = []
        for size in self._counts:
            rows = slice(first, first := first + size)
            longest = max(self._lengths[rows]) + self.tokens
            hides = longest > min(self._lengths[rows]) + 1
            mask = self._mask(positions[rows], longest) if hides else None
            self._calls.append(_Together(both[:, rows, :, :longest].unbind(), mask))
        longest = max(self._lengths)
        if longest > min(self._lengths):
            begin = torch.arange(count * heads).view(count, 1, heads) * columns
            self._at = (begin + positions[..., None]).flatten()
            self._into = both.flatten(1, 3).unbind()
        else:
            new = both[:, :count, :, longest : longest + self.tokens]
            self._at, self._into = None, (new.squeeze(3) if self.tokens == 1 else new).unbind()

    def _mask(self, positions: Tensor, columns: int) -> Tensor:
        """What hides the columns behind each of new tokens (rows, tokens)."""
        seen = torch.arange(columns) <= positions[..., None]  # (rows, tokens, columns)
        mask = torch.zeros(seen.shape, dtype=self._memory.dtype).masked_fill_(~seen, float("-inf"))
        return mask.repeat_interleave(self._decoder.groups, 1)[:, None]

    def _make_room(self, rows: int, columns: int) -> None:
        """For so many rows and columns, at least, and for what is here. What the mask hides has to be a number, too:
        zeros."""
        columns = max([columns, *self._lengths])
        own, held = self._memory.shape[2], self._memory.shape[4]
        if own >= rows and columns <= held <= _TOO_MANY * (columns + _MORE_COLUMNS):
            return
        if own < rows:
            own = min(self._places, max(rows, 2 * own))
        if not columns <= held <= _TOO_MANY * (columns + _MORE_COLUMNS):
            held = columns + max(_MORE_COLUMNS, columns // 2)
        kind = self._decoder.kept
        made = _zeros((kind.layers, 2, own, kind.heads, held, kind.width), kind.dtype)
        kept, longest = len(self._lengths), max(self._lengths, default=0)
        if kept:
            made[:, :, :kept, :, :longest] = self._memory[:, :, :kept, :, :longest]
        self._memory = made


def _zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros in main memory of which the system takes a page when something is written there, and no sooner."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, **private)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)


_CALL = 1 << 14
"""Numbers of keys that are read in the time of one more call: measured, see decision 46."""


def attention_groups(lengths: Sequence[int], width: int) -> tuple[list[int], int]:
    """How many rows, one after another, attend in each call, and what all calls cost in columns; the cheapest way.

    A column has ``width`` numbers of keys. One more token in every row changes nothing.
    """
    call = -(-_CALL // width)
    costs, begins = [0], [0]  # of the rows up to here
    for end in range(1, len(lengths) + 1):
        longest, least, begin = 0, 0, 0
        for first in reversed(range(end)):
            longest = max(longest, lengths[first])
            cost = costs[first] + call + (end - first) * longest
            if not least or cost < least:
                least, begin = cost, first
        costs.append(least)
        begins.append(begin)
    counts, end = [], len(lengths)
    while end:
        counts.append(end - begins[end])
        end = begins[end]
    return counts[::-1], costs[-1]
