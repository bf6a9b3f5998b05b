"""Prompts on their way through a decoder, one behind another: none is padded, and each sees itself alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class _Alike:
    """Prompts of one length: their rows, and where their ``tokens`` stand among those of all prompts."""

    rows: slice
    tokens: slice
    count: int


class Reading:
    """Reads prompts of ``lengths`` into the rows of a memory (layers, 2, rows, heads, columns, head width) from
    ``first`` on. The memory has the ``known`` first tokens of a single one.

    ``positions`` (tokens) are the columns of all tokens, ``last`` (rows) which of them are their prompts' last.
    """

    def __init__(self, memory: Tensor, first: int, lengths: Sequence[int], known: int) -> None:
        self._memory, self._known = memory, known
        self._alike: list[_Alike] = []
        row = token = 0
        for length, same in itertools.groupby(lengths):
            count = len(list(same))
            rows, tokens = slice(first + row, first + row + count), slice(token, token + count * (length - known))
            self._alike.append(_Alike(rows, tokens, count))
            row, token = row + count, tokens.stop
        self.positions = torch.cat([torch.arange(known, length) for length in lengths])
        self.last = torch.tensor([length - known for length in lengths]).cumsum(0) - 1
        self._mask = (  # of the single one, whose known tokens all of its new ones see
            torch.ones(lengths[0] - known, lengths[0], dtype=torch.bool).tril(known) if known else None
        )

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Put keys and values (tokens, heads, head width) into the memory; returns what the queries, of more heads,
        take from what stands before them."""
        found = []
        for one in self._alike:
            own, new_keys, new_values = (
                tensor[one.tokens].unflatten(0, (one.count, -1)).transpose(1, 2) for tensor in (query, key, value)
            )
            keys, values = self._memory[layer, :, one.rows, :, : self._known + own.shape[2]]
            keys[:, :, self._known :], values[:, :, self._known :] = new_keys, new_values
            seen = functional.scaled_dot_product_attention(
                own, keys, values, self._mask, is_causal=self._mask is None, scale=scale, enable_gqa=True
            )
            found.append(seen.transpose(1, 2).flatten(0, 1))
        return torch.cat(found)
