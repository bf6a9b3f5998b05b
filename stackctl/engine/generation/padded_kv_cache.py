"""The keys and values of a running batch of any model, computed by transformers: padded on the left, grown by copying.

Models that are no plain decoders need it: transformers counts the columns of a sliding window from the newest one, and
some models take positions from the mask, so that the newest tokens of all rows have to be in one column. What a
:class:`~stackctl.engine.generation.kv_cache.KVCache` has beside one another would be seen, or hidden, wrongly.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from stackctl.engine.generation.padding import can_pad
from stackctl.engine.generation.prefix_cache import new_cache
from stackctl.engine.generation.shared_prefixes import Prefix
from stackctl.engine.models import StackedModel, cache_argument

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


class PaddedKVCache:
    """Keys and values (rows, heads, columns, width) of every layer; a row's own columns are its last ``length``.

    Layers with a sliding window keep all columns, too: the mask cuts them, and a padded row's window stays right.
    """

    mode = torch.no_grad
    draft_costs: Mapping[int, float] = {}
    pads = True

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache_argument = cache_argument(model.forward)
        self._keeps_one = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._layers: list[tuple[Tensor, Tensor]] = []
        self._lengths: list[int] = []

    def join(
        self, prompts: Sequence[Sequence[int]], prefixes: Sequence[Prefix] = (), finished: Sequence[Tensor] = ()
    ) -> Tensor:
        """Add rows; returns the logits (rows, vocabulary) behind them. Padded prompts share nothing."""
        cache = DynamicCache()
        lengths = list(map(len, prompts))
        width = max(lengths)
        ids = [[prompt[0]] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        logits = self._forward(ids, lengths, cache, {"logits_to_keep": 1} if self._keeps_one else {})
        added = _held(cache)
        if self._lengths:
            width = max(width, *self._lengths)
            added = [
                (
                    torch.cat([_widened(k, width), _widened(key, width)]),
                    torch.cat([_widened(v, width), _widened(value, width)]),
                )
                for (k, v), (key, value) in zip(self._layers, added, strict=True)
            ]
        self._layers = added
        self._lengths += lengths
        return logits

    def step(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """One more token of every row; returns the logits (rows, 1, vocabulary) behind them."""
        cache = DynamicCache()
        for number, (keys, values) in enumerate(self._layers):
            cache.update(keys, values, number)
        lengths = [length + 1 for length in self._lengths]
        logits = self._forward(tokens, lengths, cache, {})
        self._layers, self._lengths = _held(cache), lengths
        return logits[:, None]

    def leave(self, row: int, failed: bool = False) -> None:
        """A row leaves, and the last one takes its place; columns that none is left to need leave with it."""
        rows = list(range(len(self._lengths)))
        rows[row] = rows[-1]
        self._lengths = [self._lengths[number] for number in rows[:-1]]
        width = max(self._lengths, default=0)
        self._layers = [
            (k[rows[:-1], :, k.shape[2] - width :].contiguous(), v[rows[:-1], :, v.shape[2] - width :].contiguous())
            for k, v in self._layers
        ] if width else []  # fmt: skip

    def text(self, row: int) -> Tensor:
        """Nothing is gone on from here."""
        raise NotImplementedError

    def order(self) -> Sequence[int]:
        """Which row is at each place: where it was."""
        return range(len(self._lengths))

    def keep(self, row: int) -> None:
        """Nothing is guessed here."""
        raise NotImplementedError

    def prepare(self, steps: int) -> None:
        """Nothing is prepared: transformers' modules are called."""

    def release(self) -> None:
        """Nothing is held that no row needs."""

    def _forward(
        self, ids: Sequence[Sequence[int]], lengths: Sequence[int], cache: DynamicCache, keep: dict[str, int]
    ) -> Tensor:
        """The logits (rows, vocabulary) behind the last of new tokens, of rows that have these ``lengths`` then."""
        device = self._model.device
        new, own = torch.tensor(ids, device=device), torch.tensor(lengths, device=device)[:, None]
        columns = torch.arange(max(lengths), device=device)[None] - max(lengths) + own  # from each row's first token on
        made = self._model(
            input_ids=new,
            attention_mask=(columns >= 0).long(),
            position_ids=columns[:, -new.shape[1] :].clamp(min=0),
            use_cache=True,
            **{self._cache_argument: cache},
            **keep,
        )
        logits: Tensor = made.logits[:, -1].float()
        return logits


def _held(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys, layer.values) for layer in cast(list[Any], cache.layers)]


def _widened(tensor: Tensor, width: int) -> Tensor:
    return functional.pad(tensor, (0, 0, width - tensor.shape[2], 0))
