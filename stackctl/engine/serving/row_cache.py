"""The keys and values of a running batch, padded on the left, which rows join and leave."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from stackctl.engine.generation.padding import can_pad
from stackctl.engine.generation.prefix_cache import new_cache
from stackctl.engine.models import StackedModel

_BY_PLACE = "chunked_attention"
"""Attention within chunks that are counted from a batch's first column, which padding would move."""


def can_batch(stacked: StackedModel) -> bool:
    """Whether rows of a batch can join and leave: the model keeps nothing but keys and values, and is told positions.

    A model that has a recurrent state, or positions that depend on a text's length, cannot.
    """
    config = stacked.model.config
    text = config.get_text_config(decoder=True)
    return (
        new_cache(stacked) is not None
        and text is config
        and _BY_PLACE not in (getattr(text, "layer_types", None) or ())
        and can_pad(stacked.model)
        and "position_ids" in inspect.signature(stacked.model.forward).parameters
    )


class RowCache:
    """Keys and values (rows, heads, columns, width) of every layer; a row's own columns are its last ``length``.

    Layers with a sliding window keep all columns, too: the mask cuts them, and a padded row's window stays right.
    """

    def __init__(self) -> None:
        self._layers: list[tuple[Tensor, Tensor]] = []
        self._lengths: list[int] = []

    @property
    def lengths(self) -> list[int]:
        return list(self._lengths)

    def join(self, cache: DynamicCache, length: int) -> None:
        """Add a row, whose prompt of ``length`` tokens was computed by itself."""
        width = max([*self._lengths, length])
        added = _held(cache)
        if not self._lengths:
            self._layers = added
        else:
            self._layers = [
                (
                    torch.cat([_widened(k, width), _widened(key, width)]),
                    torch.cat([_widened(v, width), _widened(value, width)]),
                )
                for (k, v), (key, value) in zip(self._layers, added, strict=True)
            ]
        self._lengths.append(length)

    def keep(self, rows: Sequence[int]) -> None:
        """Leave only these rows, and no more columns than the longest of them has."""
        if len(rows) == len(self._lengths):
            return
        self._lengths = [self._lengths[row] for row in rows]
        width = max(self._lengths, default=0)
        at = list(rows)
        self._layers = [
            (k[at][:, :, k.shape[2] - width :].contiguous(), v[at][:, :, v.shape[2] - width :].contiguous())
            for k, v in self._layers
        ] if rows else []  # fmt: skip

    def open(self, device: torch.device) -> tuple[DynamicCache, Tensor, Tensor]:
        """For one more token of every row: a cache for transformers, the mask (rows, columns + 1), the positions."""
        width = max(self._lengths) + 1
        cache = DynamicCache()
        for number, (keys, values) in enumerate(self._layers):
            cache.update(keys, values, number)
        lengths = torch.tensor(self._lengths, device=device)
        columns = torch.arange(width, device=device)
        mask = (columns[None] >= (width - 1 - lengths)[:, None]).long()
        return cache, mask, lengths[:, None]

    def close(self, cache: DynamicCache) -> None:
        """Take over what the cache holds after that token."""
        self._layers = _held(cache)
        self._lengths = [length + 1 for length in self._lengths]


def _held(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys, layer.values) for layer in cast(list[Any], cache.layers)]


def _widened(tensor: Tensor, width: int) -> Tensor:
    return functional.pad(tensor, (0, 0, width - tensor.shape[2], 0))
