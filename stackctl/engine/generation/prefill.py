"""Prompts on their way through a decoder, one behind another: none is padded, and each sees itself alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Copy:
    """The first ``tokens`` of a row are those of another row of the memory."""

    row: int
    source: int
    tokens: int


@dataclass(frozen=True)
class _Alike:
    """Prompts of one length whose new tokens begin in one column: their rows, and where their new tokens stand among
    those of all prompts. ``mask`` (new tokens, columns) says what each of several sees behind a known beginning."""

    rows: slice
    tokens: slice
    begin: int
    length: int
    mask: Tensor | None


class Prefill:
    """Reads prompts into the rows of a memory (layers, 2, rows, heads, columns, head width) from ``first`` on.

    ``spans`` are the columns of each prompt's new tokens: from the first that is computed up to its length. What comes
    before them is there, or is a copy of a row that is read in the same pass: layer by layer, in this order.
    ``positions`` (new tokens) are the columns of all, ``last`` (rows) which of them are their prompts' last.
    """

    def __init__(
        self, memory: Tensor, first: int, spans: Sequence[tuple[int, int]], copies: Sequence[Copy] = ()
    ) -> None:
        self._memory, self._copies = memory, copies
        self._alike: list[_Alike] = []
        row, token = first, 0
        for (begin, length), same in itertools.groupby(spans):
            count, new = len(list(same)), length - begin
            rows, tokens = slice(row, row + count), slice(token, token + count * new)
            mask = torch.ones(new, length, dtype=torch.bool).tril(begin) if begin and new > 1 else None
            self._alike.append(_Alike(rows, tokens, begin, length, mask))
            row, token = rows.stop, tokens.stop
        self.positions = torch.cat([torch.arange(*span) for span in spans])
        self.last = torch.tensor([length - begin for begin, length in spans]).cumsum(0) - 1

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Put keys and values (tokens, heads, head width) into the memory; returns what the queries, of more heads,
        take from what stands before them."""
        memory = self._memory[layer]  # (2, rows, heads, columns, head width)
        for one in self._alike:
            for kept, new in zip(memory, (key, value), strict=True):
                kept[one.rows, :, one.begin : one.length] = _by_row(new, one)
        for copy in self._copies:
            memory[:, copy.row, :, : copy.tokens] = memory[:, copy.source, :, : copy.tokens]
        found = []
        for one in self._alike:
            keys, values = memory[:, one.rows, :, : one.length]
            causal = not one.begin
            seen = functional.scaled_dot_product_attention(
                _by_row(query, one), keys, values, one.mask, is_causal=causal, scale=scale, enable_gqa=True
            )
            found.append(seen.transpose(1, 2).flatten(0, 1))
        return torch.cat(found)


def _by_row(tensor: Tensor, one: _Alike) -> Tensor:
    """Of a tensor (tokens, heads, head width) the part of some prompts: (rows, heads, new tokens, head width)."""
    by_row: Tensor = tensor[one.tokens].unflatten(0, (-1, one.length - one.begin)).transpose(1, 2)
    return by_row
