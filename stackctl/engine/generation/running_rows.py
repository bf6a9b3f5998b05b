"""The keys and values of a batch whose rows join and leave, in memory that is made once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_MORE_COLUMNS = 128


class Decoder(Protocol):
    """What computes the rows; ``groups`` is how many heads see one key."""

    @property
    def groups(self) -> int: ...
    def read(self, ids: Tensor, cache: DynamicCache, last: Sequence[int]) -> Tensor: ...
    def step(self, tokens: Tensor, rows: RunningRows) -> Tensor: ...


class RunningRows:
    """Keys and values of rows that join and leave, each from column 0 on.

    In a step every row has the same number of new ``tokens``. ``positions`` (rows · tokens) are their columns, ``mask``
    (rows, 1, tokens · heads of a group, columns) is added to what they see: 0, or -inf; None where it is everything.
    """

    def __init__(self, decoder: Decoder, places: int) -> None:
        self._decoder, self._places = decoder, places
        self._lengths: list[int] = []
        self._memory = torch.empty(0, 2, places, 0, 0, 0)  # (layers, 2, places, heads, columns, head width)
        self._at: Tensor | None = None
        self._seen: Sequence[Tensor] = ()
        self._into: Sequence[Tensor] = ()
        self.tokens = 1
        self.positions = torch.empty(0, dtype=torch.long)
        self.mask: Tensor | None = None

    def join(self, prompts: Sequence[Sequence[int]], cache: DynamicCache | None = None) -> Tensor:
        """Add rows; returns the logits (rows, vocabulary) behind them. ``cache`` has the beginning of a single one."""
        cache = DynamicCache() if cache is None else cache
        known, first, width = cache.get_seq_length(), len(self._lengths), max(map(len, prompts))
        ids = torch.tensor([[*prompt, *[0] * (width - len(prompt))][known:] for prompt in prompts])
        logits = self._decoder.read(ids, cache, [len(prompt) - known - 1 for prompt in prompts])
        held = [(layer.keys, layer.values) for layer in cast("list[Any]", cache.layers)]
        self._make_room(width, len(held), held[0][0])
        for memory, both in zip(self._memory, held, strict=True):
            for to, new in zip(memory, both, strict=True):
                to[first : first + len(prompts), :, :width] = new
        self._lengths += map(len, prompts)
        return logits

    def step(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """One more token of every row, and guesses of those behind it, as many in each row; returns the logits
        (rows, tokens, vocabulary) behind them. Only the first is kept, and with :meth:`keep` those that were right."""
        count, self.tokens = len(tokens), len(tokens[0])
        longest, shortest = max(self._lengths), min(self._lengths)
        columns = longest + self.tokens
        self._make_room(columns, len(self._memory), self._memory)
        positions = torch.tensor(self._lengths)[:, None] + torch.arange(self.tokens)  # (rows, tokens)
        self.positions = positions.flatten()
        self.mask = None
        if columns > shortest + 1:
            seen = torch.arange(columns) <= positions[..., None]  # (rows, tokens, columns)
            mask = torch.zeros(seen.shape, dtype=self._memory.dtype).masked_fill_(~seen, float("-inf"))
            self.mask = mask.repeat_interleave(self._decoder.groups, 1)[:, None]
        self._cut(positions, longest, longest > shortest)
        logits = self._decoder.step(torch.tensor(tokens).flatten(), self)
        self._lengths = [length + 1 for length in self._lengths]
        return logits.view(count, self.tokens, -1)

    def keep(self, row: int) -> None:
        """One more of the guesses of the last step belongs to a row's text."""
        self._lengths[row] += 1

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys and values (rows · tokens, heads, head width) behind each row; returns all that the layer has."""
        keys, values = 2 * layer, 2 * layer + 1
        for number, new in ((keys, key), (values, value)):
            if self._at is not None:
                self._into[number].index_copy_(0, self._at, new.reshape(-1, new.shape[-1]))
            elif self.tokens == 1:
                self._into[number].copy_(new)
            else:
                self._into[number].copy_(new.unflatten(0, (-1, self.tokens)).transpose(1, 2))
        return self._seen[keys], self._seen[values]

    def leave(self, row: int) -> None:
        """A row leaves, and the last one takes its place."""
        last = self._lengths.pop()
        if row < len(self._lengths):
            self._lengths[row] = last
            self._memory[:, :, row, :, :last] = self._memory[:, :, len(self._lengths), :, :last]

    def hand_over(self, cache: DynamicCache) -> int:
        """Let a cache hold what the only row has by now; returns how many tokens that are."""
        [length] = self._lengths
        for layer, (keys, values) in zip(cast("list[DynamicLayer]", cache.layers), self._memory, strict=True):
            layer.keys, layer.values = keys[:1, :, :length], values[:1, :, :length]
        return length

    def _cut(self, positions: Tensor, longest: int, uneven: bool) -> None:
        """Views of the memory for a step, made at once for all layers, keys and values of each: what is seen (rows,
        heads, columns, head width), and where the new ones go: (rows, heads, tokens, head width), without the tokens
        where there is one. Rows of unlike length go to places (rows · tokens · heads) of (all columns, head width).
        """
        count, heads, columns = len(positions), *self._memory.shape[3:5]
        both = self._memory.flatten(0, 1)
        seen = both[:, :count, :, : longest + self.tokens]
        self._seen = seen.unbind()
        if uneven:
            begin = torch.arange(count * heads).view(count, 1, heads) * columns
            self._at = (begin + positions[..., None]).flatten()
            self._into = both.flatten(1, 3).unbind()
        else:
            new = seen[:, :, :, longest:]
            self._at, self._into = None, (new.squeeze(3) if self.tokens == 1 else new).unbind()

    def _make_room(self, columns: int, layers: int, like: Tensor) -> None:
        """For so many columns, of heads as in ``like`` (…, heads, columns, head width). What the mask hides has to be
        a number, too: zeros."""
        held = self._memory.shape[4]
        if held >= columns:
            return
        heads, width = like.shape[-3], like.shape[-1]
        columns += max(_MORE_COLUMNS, columns // 2)
        made = like.new_zeros(layers, 2, self._places, heads, columns, width)
        if held:
            made[..., :held, :] = self._memory
        self._memory = made
